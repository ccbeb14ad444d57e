"""Policies as they are typed: `method[:budget][,option=value]...`, on the command line and in configuration files."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import vlcache_jax.policies.methods  # noqa: F401  (the methods make themselves known)
from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.budget import Budget, Bytes, ByteShare, Mass, Tokens
from vlcache_jax.policies.methods.method import METHODS, options_of
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.rows.spans import AllRows, LastRows, PostVision, Rows
from vlcache_jax.terminal import words
from vlcache_jax.terminal.options import typed

_BUDGETS = (
    "0.1 or 10% of the prompt's cache, 256 (tokens a layer), 64MiB (bytes a prompt), bytes:0.25 (of a 16-bit cache's), "
    "or mass:0.98:0.4"
)
_BUDGET = re.compile(rf"(?P<number>{words.NUMBER.pattern}) *(?P<unit>%|[KMG]i?B|B|)", re.IGNORECASE | re.ASCII)
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CONSTANTS = {"true": True, "false": False, "none": None}


def policy_by_name(text: str, **options: Any) -> Policy:
    """The policy that a text names.

    Args:
      text: a method's name, then a budget and options where the method's own are not wanted:
        "vl_cache", "vl_cache:0.2", "snap_kv:256,window=16,heads=shared". A budget is `0.1` or `10%` of the prompt's
        cache, `256` tokens a layer, `64MiB` a prompt, `bytes:0.25` of a 16-bit cache's bytes (`ByteShare`), or
        `mass:0.98:0.4`: `Mass(0.98, cap=0.4)`. Options are arguments
        of the method's function; `rows` takes post_vision, last:COUNT or all.
      **options: more of them, as Python values. Every method takes `decoding`, too, here and in the text: "append",
        "window:256" or "recompress:128" (h2o, tova and streaming_llm also "evict"), see `Policy.decoding`.

    Raises:
      PolicyError: a name or option that does not exist (with the nearest), an option that is given twice, or a value
        that is no budget, out of range or of the wrong type.

    Example:
      >>> policy_by_name("vl_cache:64,heads=shared") == policy_by_name("vl_cache", budget=64, heads="shared")
      True
    """
    name, given = _parse(text)
    twice = sorted(given.keys() & options.keys())
    if twice:
        raise PolicyError(f"policy option {twice[0]!r} is given twice: give it once")
    return _build(name, given | options)


def _build(name: str, options: dict[str, Any]) -> Policy:
    if name not in METHODS:
        raise PolicyError(f"policy {words.shown(name)} does not exist{words.nearest(name, list(METHODS))}")
    make = METHODS[name].make
    known, given = options_of(make), ", ".join(f"{key}={value!r}" for key, value in options.items())
    rule = None if "decoding" in known else options.pop("decoding", None)
    for option in options:
        if option not in known:
            raise PolicyError(f"policy {name!r} has no option {words.shown(option)}{words.nearest(option, known)}")
    try:
        policy = make(**options)
    except TypeError as error:  # a word where a number belongs
        raise PolicyError(
            f"policy {name!r} cannot be built with {given} ({error}): check the options' types"
        ) from error
    return policy if rule is None else dataclasses.replace(policy, decoding=rule)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of what was typed."""
    name, budget, words_of = typed(text, "policy", "heads=shared")
    if budget is not None and "budget" in words_of:
        raise PolicyError("policy option 'budget' is given twice: give it once")
    options: dict[str, Any] = {} if budget is None else {"budget": _budget(budget)}
    return name, options | {key: _value(key, word) for key, word in words_of.items()}


def _budget(text: str) -> Budget:
    """What a budget's word means: its range is the policy's matter."""
    word = text.strip(" ")
    if word[:5].lower() == "mass:":
        parts = word[5:].split(":")
        if len(parts) <= 2 and all(map(words.NUMBER.fullmatch, parts)) and all(map(math.isfinite, map(float, parts))):
            return Mass(*map(float, parts))
    elif word[:6].lower() == "bytes:" and words.NUMBER.fullmatch(word[6:]) and math.isfinite(float(word[6:])):
        return ByteShare(float(word[6:]))
    elif (
        (match := _BUDGET.fullmatch(word))
        and len(match["number"]) <= 40
        and abs(value := float(match["number"])) < 2**62
    ):
        unit = match["unit"].upper()
        if unit in _BYTES:
            return Bytes(round(value * _BYTES[unit]))
        if unit == "%":
            return value / 100
        return Tokens(int(word)) if word.isdecimal() and value > 1 else value
    raise PolicyError(f"{words.shown(text)} is not a budget: give {_BUDGETS}")


def _rows(text: str) -> Rows:
    kind, _, count = text.partition(":")
    if text in ("post_vision", "all"):
        return PostVision() if text == "post_vision" else AllRows()
    if kind == "last":
        return LastRows(_read(words.whole(1), count, f"rows={words.shown(text)}"))
    raise PolicyError(f"rows={words.shown(text)} is not known: use post_vision, last:COUNT (such as last:50) or all")


def _value(key: str, text: str) -> Any:
    """An option's value: a budget, rows, a constant, a whole number, a number, or the word itself."""
    if key in ("budget", "rows"):
        return _budget(text) if key == "budget" else _rows(text)
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if words.WHOLE.fullmatch(text):
        return _read(words.whole(-words.LARGEST), text, f"policy option {words.shown(key)}")
    try:
        return words.number(text)
    except argparse.ArgumentTypeError:
        return text


def _read(reader: Callable[[str], int], text: str, what: str) -> int:
    try:
        return reader(text)
    except argparse.ArgumentTypeError as error:
        raise PolicyError(f"{what}: {error}") from None
