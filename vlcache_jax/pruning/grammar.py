"""Pruning methods as they are typed: `method[,option=number/number...]...`."""

import dataclasses
from typing import Any

import vlcache_jax.pruning.methods  # noqa: F401  (the methods make themselves known)
from vlcache_jax.errors import PolicyError
from vlcache_jax.pruning.method import METHODS, Pruning
from vlcache_jax.terminal import words


def pruning_by_name(text: str) -> Pruning:
    """The pruning method that a text names.

    Args:
      text: a method's name, then options where its own are not wanted; an option is a number, or numbers with "/"
        between them.

    Raises:
      PolicyError: a name or option that does not exist, with the nearest, or a value that is none.

    Example:
      >>> pruning_by_name("pyramid_drop,layers=4/8,keep=0.5/0.25")
      PyramidDrop(rooms=None, layers=(4, 8), keep=(0.5, 0.25))
    """
    name, *parts = text.split(",")
    if name not in METHODS:
        raise PolicyError(f"pruning {words.shown(name)} does not exist{words.nearest(name, list(METHODS))}")
    known = {field.name: "tuple" in str(field.type) for field in dataclasses.fields(METHODS[name])}
    options: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in known or key in options:
            problem = "is given twice" if key in options else f"does not exist{words.nearest(key, list(known))}"
            raise PolicyError(f"option {words.shown(key)} of pruning {name!r} {problem}")
        try:
            numbers = tuple(int(word) if word.isdecimal() else float(word) for word in value.split("/"))
        except ValueError:
            raise PolicyError(f"{words.shown(part)}: give numbers with / between them, such as 0.5/0.25") from None
        if not known[key] and len(numbers) > 1:
            raise PolicyError(f"{words.shown(part)}: give one number")
        options[key] = numbers if known[key] else numbers[0]
    return METHODS[name](**options)
