#!/usr/bin/env python
"""Train or evaluate a model from a LazyConfig: see ``train_net.py --help``."""

import sys

try:
    from smca.cli.train import main  # says what to do if Detectron2 is missing
except ImportError as error:
    sys.exit(f"Error: {error}")

if __name__ == "__main__":
    sys.exit(main())
