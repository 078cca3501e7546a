"""What the values of a section may be, as a table, and the sentence about one that is not."""

import math
from typing import Any, Callable, Mapping, NamedTuple

from smca.errors import ConfigError

__all__ = ["LIST", "NUMBER", "SECTION", "TRUE_OR_FALSE"]
__all__ += ["Kind", "check_section", "check_value", "number", "or_null", "text", "whole_number"]


class Kind(NamedTuple):
    """
    Attributes:
        words: what a value has to be, for instance "a whole number".
        accepts: whether a value is that.
    """

    words: str
    accepts: Callable[[Any], bool]


def text(words: str = "a text") -> Kind:
    return Kind(words, lambda value: isinstance(value, str))


def whole_number(least: float = -math.inf) -> Kind:
    words = "a whole number" + ("" if least == -math.inf else f" of at least {least}")
    return Kind(
        words, lambda value: _is_number(value) and value >= least and isinstance(value, int)
    )


def number(words: str, least: float = -math.inf, below: float = math.inf) -> Kind:
    """In [least, below)."""
    return Kind(words, lambda value: _is_number(value) and least <= value < below)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.accepts(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


LIST = Kind("a list", lambda value: isinstance(value, list))
NUMBER = number("a number")
SECTION = Kind("a section", lambda value: isinstance(value, Mapping))
TRUE_OR_FALSE = Kind("true or false", lambda value: isinstance(value, bool))


def check_value(name: str, value: Any, kind: Kind) -> None:
    """
    Raises:
        ConfigError: the value is not of this kind.
    """
    if not kind.accepts(value):
        raise ConfigError(f"{name} has to be {kind.words}, it cannot be {value!r}.")


def check_section(
    section: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str, if_absent: str
) -> None:
    """
    Check the values of some keys; there may be others.

    Args:
        section: a DictConfig or a dict.
        kinds: of each key its :class:`Kind`, or such a mapping for the keys of a section in it.
        prefix: put before the names of keys in messages.
        if_absent: what to do where a key is absent, for the message.

    Raises:
        ConfigError: a key is absent, or its value is not of its kind.
    """
    for key, kind in kinds.items():
        name = prefix + key
        if key not in section:
            raise ConfigError(f"{name} is missing: {if_absent}.")
        if isinstance(kind, Kind):
            check_value(name, section[key], kind)
        else:
            check_value(name, section[key], SECTION)
            check_section(section[key], kind, f"{name}.", if_absent)
