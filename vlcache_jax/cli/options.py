"""From what was typed to policies, sampling and files; everything wrong is refused before any work."""

import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from vlcache_jax.budgets import Budget, Bytes, Mass, Tokens
from vlcache_jax.cli.parser import BUDGET_FORMS
from vlcache_jax.errors import InputError, PolicyError, VLCacheError
from vlcache_jax.policies import POLICIES, LastRows, Policy, PostVision, policy_by_name
from vlcache_jax.policies.rows import AllRows, Rows
from vlcache_jax.sampling import Sampling
from vlcache_jax.writing import check_target

_DEFAULT_BUDGET = 0.1


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text: str) -> Budget:
    """The budget that a word means; its range is the policy's matter.

    Raises:
      InputError: no such word.
      PolicyError: a mass or cap out of range, or no cap.

    Example:
      >>> parse_budget("10%"), parse_budget("256"), parse_budget("64MiB"), parse_budget("mass:0.98:0.4")
      (0.1, Tokens(count=256), Bytes(count=67108864), Mass(share=0.98, cap=0.4))
    """
    try:
        budget = _budget(text.replace(" ", "").upper())
    except VLCacheError:
        raise
    except (ValueError, KeyError):
        budget = math.nan
    if budget != budget:
        raise InputError(f"{text!r} is not a budget: give {BUDGET_FORMS}")
    return budget


def _budget(word: str) -> Budget:
    if word.startswith("MASS:"):
        share, _, cap = word.removeprefix("MASS:").partition(":")
        return Mass(float(share), cap=float(cap) if cap else None)
    number = word.rstrip("KMGIB")
    if number != word:
        return Bytes(round(float(number) * _BYTES[word.removeprefix(number)]))
    if word.isdecimal() and int(word) > 1:
        return Tokens(int(word))
    return float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)


def build_policy(name: str, budget: Budget | None, options: list[str]) -> Policy:
    """The policy called `name`, with `options` of the form "name=value".

    Raises PolicyError for a malformed option or whatever `policy_by_name` refuses.
    """
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise PolicyError(f"policy option {option!r} is not of the form name=value, such as heads=shared")
        if key in values or (key == "budget" and budget is not None):
            raise PolicyError(f"policy option {key!r} is given twice: give it once")
        values[key] = _rows(text) if key == "rows" else _value(text)
    if budget is not None:
        values["budget"] = budget
    elif name in POLICIES and name not in ("full_cache", "zip_vl"):  # all; a cap on what the prompt decides
        values.setdefault("budget", _DEFAULT_BUDGET)
    try:
        return policy_by_name(name, **values)
    except TypeError as error:  # a word where a number belongs
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise PolicyError(
            f"policy {name!r} cannot be built with {given} ({error}): check the options' types"
        ) from error


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def _rows(text: str) -> Rows:
    kind, _, count = text.partition(":")
    if text in ("post_vision", "all"):
        return PostVision() if text == "post_vision" else AllRows()
    if kind == "last" and count.isdecimal():
        return LastRows(int(count))
    raise PolicyError(f"rows={text!r} is not known: use post_vision, last:COUNT (such as last:50) or all")


def build_sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling | None:
    """Greedy (None) unless one of the three is given. Raises InputError for a value out of range."""
    if temperature is None and top_k is None and top_p is None:
        return None
    return Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p)


def check_new_tokens(count: int) -> None:
    """Raises InputError unless `count` is at least 1."""
    if count < 1:
        raise InputError(f"max_new_tokens={count} leaves no room for an answer: give --max-new-tokens at least 1")


def check_picture_path(text: str | None) -> Path | None:
    """The path of a picture to write, or None where none is asked for.

    Raises InputError if Pillow cannot write such a file, or it cannot be written there.
    """
    if text is None:
        return None
    path = Path(text)
    Image.init()
    writable = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.SAVE}
    if path.suffix.lower() not in writable:
        raise InputError(
            f"--explain {text!r}: {path.suffix or 'no ending'!r} is no known image format: use .png, .jpg or .webp"
        )
    check_target(path)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--explain {text!r} cannot be written there: choose another path")
    return path
