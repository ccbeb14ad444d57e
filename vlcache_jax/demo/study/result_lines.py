"""What the lines of a results file may hold: they are read again, perhaps after a disk or an editor damaged them."""

from collections.abc import Callable
from typing import Any

from vlcache_jax.errors import is_number
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import LAYERS, TABLE_BYTES

UNITS = {"score": 100, "mass": 100, "hits": 100, "kept": 10_000}
"""Measures of each sample, and what of a line's whole numbers makes 1."""

_HIGHEST = 100  # of a measure, in its unit: CIDEr reaches 10, the others 1
_LONGEST = 1000  # characters of a name or an answer
_MOST = 2**60  # bytes or seconds

_Check = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is expected


def _is_digits(value: Any, digits: str) -> bool:
    return isinstance(value, str) and bool(value) and not value.strip(digits)


def _is_kept(value: Any) -> bool:
    layers = isinstance(value, list) and all(_is_digits(x, "0123456789") for x in value)
    return layers and len(set(map(len, value))) == 1


def _measures(most: int) -> _Check:
    def is_one(x: Any) -> bool:
        return x is None or (type(x) is int and 0 <= x <= most)

    expected = f"null, a whole number up to {most}, or a list of them"
    return lambda x: is_one(x) or (isinstance(x, list) and all(map(is_one, x))), expected


_NAME: _Check = (lambda x: isinstance(x, str) and 0 < len(x) <= _LONGEST, "a name")
_BYTES: _Check = (lambda x: type(x) is int and 0 <= x <= _MOST, "a number of bytes")
_ONES: _Check = (lambda x: _is_digits(x, "01"), "a text of the digits 0 and 1")
_SHARES: _Check = (
    lambda x: isinstance(x, list) and len(x) in LAYERS and all(is_number(y, 0, 1.001) for y in x),
    "a list of shares, one for each layer",
)
_KEY: dict[str, _Check] = {
    "task": _NAME,
    "method": _NAME,
    "budget": (lambda x: is_number(x, 0, 1) and x > 0, "a fraction"),
}
_PICTURED: dict[str, _Check] = {
    "answer": (lambda x: isinstance(x, str) and len(x) <= _LONGEST, "a short text"),
    "layers": (_is_kept, "a list of texts of digits, equally long"),
    "text": (lambda x: isinstance(x, list) and all(is_number(y, 0, _MOST) for y in x), "a list of numbers"),
}
_FIELDS: dict[str, dict[str, _Check]] = {
    "study": {},
    "run": {},
    "result": {
        **_KEY,
        "mode": _NAME,
        "state_bytes": _BYTES,
        "full_bytes": _BYTES,
        "seconds": (lambda x: is_number(x, 0, _MOST), "a number of seconds"),
        "layers": _SHARES,
        "density": _SHARES,
        "exact": _ONES,
        "agrees": _ONES,
        **{name: _measures(_HIGHEST * unit) for name, unit in UNITS.items()},
    },
    "kept": _KEY,
}
"""What a line of each kind must hold."""


def parse_line(text: bytes, samples: int | None) -> dict[str, Any]:
    """A line, checked in full.

    Args:
      text: without its line break.
      samples: of the study; None if that is not known.

    Raises:
      ValueError: it is not such a line; says what is wrong with it.
    """
    line = parse_json(text, TABLE_BYTES)
    if not isinstance(line, dict):
        raise ValueError(f"it is {shorten(line)}, not an object")
    kind = line.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"its kind is {shorten(kind)}, none of {', '.join(_FIELDS)}")
    fields = _FIELDS[kind] | (_PICTURED if kind == "kept" and _PICTURED.keys() & line.keys() else {})
    for name, (right, expected) in fields.items():
        if name not in line:
            raise ValueError(f"it has no {name!r}")
        if not right(line[name]):
            raise ValueError(f"{name} is {shorten(line[name])}, not {expected}")
    if kind == "result":
        if len(line["layers"]) != len(line["density"]):
            raise ValueError(f"layers has {len(line['layers'])} numbers, density {len(line['density'])}")
        count = samples or len(line["exact"])
        for name, what in (("exact", "digits"), ("agrees", "digits"), *((name, "numbers") for name in UNITS)):
            if isinstance(line[name], str | list) and len(line[name]) != count:
                raise ValueError(f"{name} has {len(line[name])} {what} for {count} samples")
    return line
