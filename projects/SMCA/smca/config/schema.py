"""What a value in a section may be, and the sentence about one that is not."""

import math
from typing import Any, Callable, Mapping, NamedTuple

from smca.errors import ConfigError

__all__ = ["LIST", "NUMBER", "SECTION", "TRUE_OR_FALSE"]
__all__ += ["Kind", "check_value", "number", "or_null", "text", "whole_number"]


class Kind(NamedTuple):
    """
    Attributes:
        words: what a value has to be, for instance "a whole number".
        accepts: whether a value is that.
    """

    words: str
    accepts: Callable[[Any], bool]


def text(words: str = "a text") -> Kind:
    """A string, called `words`."""
    return Kind(words, lambda value: isinstance(value, str))


def whole_number(
    least: float = -math.inf, below: float = math.inf, words: str = "a whole number"
) -> Kind:
    """An integer in [least, below), called `words`."""
    words += "" if least == -math.inf else f" of at least {least}"
    return Kind(words, lambda value: _is_number(value, int) and least <= value < below)


def number(words: str = "a number", least: float = -math.inf, below: float = math.inf) -> Kind:
    """A number in [least, below), called `words`."""
    return Kind(words, lambda value: _is_number(value, (int, float)) and least <= value < below)


def or_null(kind: Kind) -> Kind:
    """`kind` or None."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.accepts(value))


def _is_number(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


LIST = Kind("a list", lambda value: isinstance(value, list))
NUMBER = number()
SECTION = Kind("a section", lambda value: isinstance(value, Mapping))
TRUE_OR_FALSE = Kind("true or false", lambda value: isinstance(value, bool))


def check_value(name: str, value: Any, kind: Kind) -> None:
    """
    Raises:
        ConfigError: the value is not of this kind; `name` is what the message calls it.
    """
    if not kind.accepts(value):
        raise ConfigError(f"{name} has to be {kind.words}, it cannot be {value!r}.")
