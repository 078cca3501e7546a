"""Values of the tools' options."""

import argparse


def count(text: str) -> int:
    """A whole number of at least 1; for the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"has to be a whole number of at least 1, not {text}")
    return int(text)
