"""Errors that the user can put right, and what their messages have in common."""

import difflib
import sys
from typing import Any, Callable, Collection, Optional

_MAX_LISTED = 40  # names in a message


class UserError(ValueError):
    """
    Something that the user can put right. The message is one sentence that names the file or
    the config key and says what to do; command lines print it without a traceback.
    """


class ConfigError(UserError):
    """A config or an override that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss or the gradient became nan or infinite."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a sentence that says that there is no `name`.

    Returns:
        ``", did you mean NEAREST?"``, or if none is near ``": there are A, B."``, or if those are
        too many ``"."``.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f", did you mean {nearest[0]}?"
    return f": there are {', '.join(known)}." if len(known) <= _MAX_LISTED else "."


def exit_code(command: Callable[..., Optional[int]], *args: Any) -> int:
    """
    Run a command line's work.

    Returns:
        What `command` returns (0 for None), or 1 after a :class:`UserError`, which is printed.
    """
    try:
        return command(*args) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
