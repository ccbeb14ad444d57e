"""What a typed word means. Everything here refuses as argparse wants it, and imports nothing heavy."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence

LARGEST = 2**31 - 1  # of any whole number: what an int32 holds
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """Reads a whole number from `low` to `high`, in decimal digits."""

    def parse(text: str) -> int:
        if not WHOLE.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number")
        if len(text) > 30 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is out of range: give a whole number from {low} to {high}")
        return int(text)

    return parse


def number(text: str) -> float:
    """A finite number, in decimal digits."""
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
    return value


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


class VideoPath(str):
    """The path of a video, typed among those of images."""


def video(text: str) -> VideoPath:
    """A path that can be one."""
    return VideoPath(path(text))


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


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message about a word that is not known."""
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.4)
    did_you_mean = f": did you mean {close[0]!r}?" if close else ":"
    return f"{did_you_mean} Known: {', '.join(known)}"
