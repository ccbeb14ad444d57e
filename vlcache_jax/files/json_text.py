"""JSON from others, read strictly: what passes is small, finite, and says one thing. All JSON is read through it."""

import json
import math
import re
from typing import Any

from vlcache_jax.files.limits import JSON_BYTES, JSON_DEPTH, JSON_DIGITS

_LONG = re.compile(rf"[0-9]{{{JSON_DIGITS + 1}}}", re.ASCII)
_SHOWN = 60  # characters of a value that a message shows


def parse_json(text: str | bytes, most: int = JSON_BYTES) -> Any:
    """A JSON value.

    Args:
      text: UTF-8, if bytes.
      most: bytes that it may have.

    Raises:
      ValueError: it is larger than the limits in `vlcache_jax.files.limits`, no JSON, a key occurs twice with different
        values, a number is NaN, infinite or too long, or a text is not valid Unicode. Where that is known the message
        begins with the place, such as "text_config.rope_theta is nan".

    Example:
      >>> parse_json('{"a": [1, 2.5]}')
      {'a': [1, 2.5]}
    """
    if len(text) > most:
        raise ValueError(f"it has {len(text)} bytes, more than {most}")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        # The hook for numbers is slow and needed by the few texts alone that hold a long one.
        hook = _integer if _LONG.search(text) else None
        value = json.loads(text, object_pairs_hook=_object, parse_int=hook)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check(value)
    return value


def shorten(value: Any, most: int = 100) -> str:
    """How a message shows a value: on one line, at most `most` characters, whatever it is."""
    if isinstance(value, str):
        text = json.dumps(value[: most + 1])
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
        text = f"a whole number of more than {most} digits"
    else:
        try:
            text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
        except (TypeError, ValueError, RecursionError):
            text = f"a {type(value).__name__}"
    text = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= most else text[: most - 3] + "..."


class _LongNumber:
    """A whole number of more digits than any size has: Python would take its time to read it, or refuse."""

    def __init__(self, digits: str) -> None:
        self.digits = digits


def _integer(digits: str) -> Any:
    return int(digits) if len(digits.lstrip("-")) <= JSON_DIGITS else _LongNumber(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            other = found[key]
            if type(value) is not type(other) or value != other:
                raise ValueError(f"the key {shorten(key)} occurs twice, with different values")
    return found


def _check(value: Any) -> None:
    path: list[str | int] = []
    wrong = _wrong_inside(value, JSON_DEPTH, path)
    if wrong is not None:
        keys = (f"[{key}]" if isinstance(key, int) else f".{shorten(key, _SHOWN)[1:-1]}" for key in reversed(path))
        raise ValueError(f"{''.join(keys).lstrip('.') or 'it'} is {wrong}")


def _wrong_inside(value: Any, depth: int, path: list[str | int]) -> str | None:
    """What is wrong first, with the keys that lead to it added to `path`, the innermost first."""
    if not isinstance(value, dict | list):
        return _wrong(value)
    if depth == 0:
        return f"nested more than {JSON_DEPTH} levels deep"
    if isinstance(value, dict):
        for key in value:
            if not _is_unicode(key):
                return f"an object with the key {shorten(key)}, which is not valid Unicode"
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        wrong = _wrong_inside(item, depth - 1, path)
        if wrong is not None:
            path.append(key)
            return wrong
    return None


def _wrong(value: Any) -> str | None:
    """What is wrong with a value that is no list and no object."""
    if isinstance(value, str):
        return None if _is_unicode(value) else f"{shorten(value, _SHOWN)}, which is not valid Unicode"
    if isinstance(value, _LongNumber):
        digits = value.digits
        return f"{digits[:20]}... ({len(digits)} characters); numbers have at most {JSON_DIGITS} digits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}; expected a finite number"
    return None


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
