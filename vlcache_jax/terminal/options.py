"""What is typed as `name[:value][,option=value]...`: cache policies, patterns of a prefill, pruning methods."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlcache_jax.errors import PolicyError
from vlcache_jax.terminal import words


class Typed(NamedTuple):
    """A text in its parts.

    Attributes:
      name: in front of a colon or comma.
      value: behind the colon; None without one.
      options: the others.
    """

    name: str
    value: str | None
    options: dict[str, str]


def typed(text: str, what: str, example: str) -> Typed:
    """The parts of a text.

    Args:
      text: what was typed.
      what: it is, for messages: "policy".
      example: of an option.

    Raises:
      PolicyError: an option that is none, or is given twice.

    Example:
      >>> typed("fast_v:0.25, layer=3", "pruning", "layer=3")
      Typed(name='fast_v', value='0.25', options={'layer': '3'})
    """
    head, *parts = text.split(",")
    name, colon, value = head.partition(":")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, word = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise PolicyError(f"{what} option {words.shown(part)} is not of the form name=value, such as {example}")
        if key in options:
            raise PolicyError(f"{what} option {words.shown(key)} is given twice: give it once")
        options[key] = word
    return Typed(name.strip(), value if colon else None, options)


def instance(text: str, kinds: Mapping[str, type[Any]], what: str, example: str, first: str | None = None) -> Any:
    """An object of the class that a text names, a dataclass, with the options that it gives.

    Args:
      text: what was typed. Several numbers of one option have "/" between them.
      kinds: classes by name.
      what, example: as in `typed`.
      first: the option behind the colon; None for the first that the class does not inherit.

    Raises:
      PolicyError: a name or option that does not exist, with the nearest, one that is given twice, or a value that is
        none.
    """
    name, value, given = typed(text, what, example)
    if name not in kinds:
        raise PolicyError(f"{what} {words.shown(name)} does not exist{words.nearest(name, list(kinds))}")
    kind = kinds[name]
    known = {field.name: _is_tuple(field.type) for field in dataclasses.fields(kind)}
    if value is not None:
        bases = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
        inherited = {field.name for base in bases for field in dataclasses.fields(base)}
        first = first or next(key for key in known if key not in inherited)
        if first in given:
            raise PolicyError(f"option {words.shown(first)} of {what} {name!r} is given twice: give it once")
        given[first] = value
    for key in given:
        if key not in known:
            raise PolicyError(
                f"option {words.shown(key)} of {what} {name!r} does not exist{words.nearest(key, list(known))}"
            )
    options = {key: _several(word) if known[key] else _one(word.strip()) for key, word in given.items()}
    try:
        return kind(**options)
    except TypeError as error:  # a word where a number belongs
        raise PolicyError(f"{what} {name!r} cannot be built ({error}): check the options' types") from error


def _is_tuple(annotation: Any) -> bool:
    """Whether an option is nothing but several numbers, or none."""
    return str(annotation).startswith("tuple[")


def _several(text: str) -> Any:
    values = tuple(_one(word.strip()) for word in text.split("/"))
    if any(isinstance(value, str) for value in values):
        return None if values == ("none",) else _refuse(text)
    return values


def _refuse(text: str) -> Any:
    raise PolicyError(f"{words.shown(text)}: give numbers with / between them, such as 0.5/0.25")


def _one(word: str) -> Any:
    """A whole number, a number, or the word itself."""
    if word.isascii() and word.isdecimal() and len(word) < 10:
        return int(word)
    value = float(word) if words.NUMBER.fullmatch(word) else math.nan
    return value if math.isfinite(value) else word
