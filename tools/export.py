#!/usr/bin/env python
"""Write a trained detector as ONNX or pt2: see ``export.py --help``."""

import sys

from smca.cli.export import get_parser, main

__all__ = ["get_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
