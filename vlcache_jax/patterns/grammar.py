"""Patterns as they are typed: `pattern[:value][,option=value]...`."""

import dataclasses
from typing import Any

import vlcache_jax.patterns.a_shape
import vlcache_jax.patterns.flex_prefill
import vlcache_jax.patterns.m_inference
import vlcache_jax.patterns.mm_inference
import vlcache_jax.patterns.tri_shape
import vlcache_jax.patterns.x_attention  # noqa: F401  (the patterns make themselves known)
from vlcache_jax.errors import PolicyError
from vlcache_jax.patterns.pattern import PATTERNS, Pattern
from vlcache_jax.terminal import words


def pattern_by_name(text: str) -> Pattern:
    """The pattern of a sparse prefill that a text names.

    Args:
      text: a pattern's name, then, behind a colon, the value of its first option, and behind commas others, where its
        own are not wanted. Several numbers of one option have "/" between them: "a_shape:128,window=2048",
        "x_attention:0.9,stride=16,dense_layers=0/1", "m_inference:heads.json".

    Raises:
      PolicyError: a name or option that does not exist, with the nearest, one that is given twice, or a value that is
        none.

    Example:
      >>> from vlcache_jax.patterns.a_shape import AShape
      >>> pattern_by_name("a_shape:64,window=512,min_tokens=0") == AShape(64, 512, min_tokens=0)
      True
    """
    head, *parts = text.split(",")
    name, colon, value = head.partition(":")
    name = name.strip()
    if name not in PATTERNS:
        raise PolicyError(f"prefill pattern {words.shown(name)} does not exist{words.nearest(name, list(PATTERNS))}")
    common = {field.name for field in dataclasses.fields(Pattern)}
    known = [field.name for field in dataclasses.fields(PATTERNS[name])]
    own = [key for key in known if key not in common]
    options: dict[str, Any] = {own[0]: _value(own[0], value)} if colon else {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise PolicyError(f"{words.shown(part)} is not of the form name=value, such as min_tokens=8192")
        if key not in known or key in options:
            problem = "is given twice" if key in options else f"does not exist{words.nearest(key, known)}"
            raise PolicyError(f"option {words.shown(key)} of prefill pattern {name!r} {problem}")
        options[key] = _value(key, value)
    try:
        return PATTERNS[name](**options)
    except TypeError as error:
        raise PolicyError(f"prefill pattern {name!r} cannot be built ({error}): check the options' types") from error


def _value(key: str, text: str) -> Any:
    if key == "dense_layers":
        return tuple(_number(word) for word in text.split("/"))
    return _number(text.strip())


def _number(word: str) -> Any:
    """A whole number, a number, or the word itself."""
    if word.isascii() and word.isdecimal() and len(word) < 10:
        return int(word)
    return float(word) if words.NUMBER.fullmatch(word) else word
