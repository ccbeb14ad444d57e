"""What a typed word means. Everything here refuses as argparse wants it, and imports nothing heavy."""

import argparse
import math
import os
import re
from collections.abc import Callable

LARGEST = 2**31 - 1  # of any whole number: what an int32 holds
BUDGET_FORMS = "0.1 or 10% of the prompt's cache, 256 (tokens a layer), 64MiB (bytes a prompt), or mass:0.98:0.4"

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_BUDGET = re.compile(rf"(?P<number>{_NUMBER.pattern}) *(?P<unit>%|[KMG]i?B|B|)", re.IGNORECASE | re.ASCII)
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

BudgetWord = tuple[str, tuple[float, ...]]


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """Reads a whole number from `low` to `high`, in decimal digits."""

    def parse(text: str) -> int:
        if not _WHOLE.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number")
        if len(text) > 30 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is out of range: give a whole number from {low} to {high}")
        return int(text)

    return parse


def number(text: str) -> float:
    """A finite number, in decimal digits."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
    return value


def budget(text: str) -> BudgetWord:
    """The kind of a budget and its numbers: their ranges are the policy's matter.

    Example:
      >>> budget("10%"), budget("256"), budget("64MiB"), budget("mass:0.98:0.4")
      (('fraction', (0.1,)), ('tokens', (256,)), ('bytes', (67108864,)), ('mass', (0.98, 0.4)))
    """
    word = text.strip(" ")
    if word[:5].lower() == "mass:":
        parts = word[5:].split(":")
        if len(parts) <= 2 and all(map(_NUMBER.fullmatch, parts)) and all(map(math.isfinite, map(float, parts))):
            return "mass", tuple(map(float, parts))
    elif (
        (match := _BUDGET.fullmatch(word))
        and len(match["number"]) <= 40
        and abs(value := float(match["number"])) < 2**62
    ):
        unit = match["unit"].upper()
        if unit in _BYTES:
            return "bytes", (round(value * _BYTES[unit]),)
        if unit == "%":
            return "fraction", (value / 100,)
        return ("tokens", (int(word),)) if word.isdecimal() and value > 1 else ("fraction", (value,))
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a budget: give {BUDGET_FORMS}")


def path(text: str) -> str:
    """A path that can be one."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: give one")
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        parts = [b"\0"]
    if max(map(len, parts)) > 255 or sum(map(len, parts)) > 4000:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too long for a path")
    if any(b"\0" in part for part in parts):
        raise argparse.ArgumentTypeError(f"{shown(text)} cannot be a path: leave out what is no character of one")
    return text


def words(text: str) -> str:
    """Text for the model: bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not valid UTF-8") from None
    return text


def shown(text: str) -> str:
    """A word as messages show it: escaped, and cut if it is long."""
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}..."
