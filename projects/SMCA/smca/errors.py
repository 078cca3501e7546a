"""Errors that the user can put right, and what their messages have in common."""

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from typing import Any, Callable, Collection, Iterator, Mapping, NoReturn, Optional

_MAX_LISTED = 40  # names in a message


class UserError(ValueError):
    """Something that the user can put right. The message names the file or the config key and says
    what to do, in one sentence or in one and a list; command lines print it without a traceback.
    """

    def __init__(self, *args: Any) -> None:
        # PyTorch raises an error of a loader's worker again as `type(error)(traceback)`.
        if len(args) == 1 and str(args[0]).startswith("Caught "):
            kind = f"{type(self).__module__}.{type(self).__qualname__}: "
            args = (str(args[0]).rpartition(kind)[2].rstrip(),)
        super().__init__(*args)


class ConfigError(UserError):
    """A config or an override that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class DatasetError(UserError):
    """A data set that cannot be used as it is."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss or the gradient became nan or infinite."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a sentence that says that there is no `name`: ``", did you mean NEAREST?"``, or if
    none is near ``": there are A, B."``, or if those are too many ``"."``.
    """
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f", did you mean {nearest[0]}?"
    return f": there are {', '.join(known)}." if len(known) <= _MAX_LISTED else "."


def counted(number: int, noun: str) -> str:
    """A number of things, as in "1 problem" or "2 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def some(names: Collection[str], count: int = 4) -> str:
    """The first few of many names, as in "a, b and 7 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(list(names)[:count]) + more


def differing(names: Mapping[str, Collection[str]]) -> str:
    """The number and the first few of names by what is wrong with them, as in "1 missing (a);
    2 unknown (b, c)"."""
    return "; ".join(
        f"{len(group)} {what} ({some(group)})" for what, group in names.items() if group
    )


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an OSError about a file or folder, of which `what` is the path or the option with it,
    into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}.") from error


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # The shell leaves ~ alone behind = and in quotes.
        words = sys.argv[1:] if args is None else args
        home = os.path.expanduser("~")
        words = [re.sub(r"(^|=)([\"']?)~(?=/)", rf"\1\2{home}", word) for word in words]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message} (see {self.prog} --help)\n")


def command_line(description: Optional[str], **kwargs: Any) -> argparse.ArgumentParser:
    """A parser whose help has the description as it is, and whose errors are one line.

    Args:
        description: of the command.
        kwargs: see `argparse.ArgumentParser`.
    """
    sys.path.append("")  # as for a script, a config may name modules in the working folder
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(description=description, formatter_class=formatter, **kwargs)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that counts something, `least` times or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"has to be a whole number of at least {least}, not {text}"
            )
        return int(text)

    return parse


def exit_code(command: Callable[..., Optional[int]], *args: Any) -> int:
    """Run a command line's work, and return what it returns (0 for None), 1 after a
    :class:`UserError`, which is printed, 130 after Ctrl-C, or 141 if the reader of a pipe went."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(*args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not written
        return 141
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
