#!/usr/bin/env python
"""Detect objects in images or a video: see ``demo.py --help``."""

import sys

from smca.cli.predict import JSON_NAME, get_parser, main, output_paths

__all__ = ["JSON_NAME", "get_parser", "main", "output_paths"]

if __name__ == "__main__":
    sys.exit(main())
