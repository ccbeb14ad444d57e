"""What the lines of a results file may hold: they are read again, perhaps after a disk or an editor damaged them."""

from collections.abc import Callable
from typing import Any

from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import LAYERS, TABLE_BYTES

KINDS = ("study", "run", "result", "kept")
UNITS = {"score": 100, "mass": 100, "hits": 100, "kept": 10_000}
"""Measures of each sample, and what of a line's whole numbers makes 1."""

_HIGHEST = 100  # of a measure, in its unit: CIDEr reaches 10, the others 1
_LONGEST = 1000  # characters of a name or an answer
_MOST = 2**60  # bytes or seconds


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
    if kind not in KINDS:
        raise ValueError(f"its kind is {shorten(kind)}, none of {', '.join(KINDS)}")
    if kind in ("result", "kept"):
        for name in ("task", "method"):
            _check(line, name, _is_text, "a name")
        _check(line, "budget", lambda x: _is_number(x) and 0 < x <= 1, "a fraction")
    if kind == "result":
        _check_result(line, samples)
    if kind == "kept" and {"layers", "text", "answer"} & line.keys():
        _check_kept(line)
    return line


def _check_result(line: dict[str, Any], samples: int | None) -> None:
    _check(line, "mode", _is_text, "a name")
    for name in ("state_bytes", "full_bytes"):
        _check(line, name, lambda x: type(x) is int and 0 <= x <= _MOST, "a number of bytes")
    _check(line, "seconds", lambda x: _is_number(x) and 0 <= x <= _MOST, "a number of seconds")
    for name in ("layers", "density"):
        _check(line, name, _is_shares, "a list of shares, one for each layer")
    if len(line["layers"]) != len(line["density"]):
        raise ValueError(f"layers has {len(line['layers'])} numbers, density {len(line['density'])}")
    count = samples
    for name in ("exact", "agrees"):
        _check(line, name, _is_digits, "a text of the digits 0 and 1")
        count = len(line[name]) if count is None else count
        if len(line[name]) != count:
            raise ValueError(f"{name} has {len(line[name])} digits for {count} samples")
    for name, unit in UNITS.items():
        most = _HIGHEST * unit

        def is_measure(x: Any, most: int = most) -> bool:
            return x is None or (type(x) is int and 0 <= x <= most)

        def is_measures(x: Any, one: Callable[[Any], bool] = is_measure) -> bool:
            return one(x) or (isinstance(x, list) and all(map(one, x)))

        _check(line, name, is_measures, f"null, a whole number up to {most}, or a list of them")
        if isinstance(line[name], list) and len(line[name]) != count:
            raise ValueError(f"{name} has {len(line[name])} numbers for {count} samples")


def _check_kept(line: dict[str, Any]) -> None:
    _check(line, "answer", lambda x: isinstance(x, str) and len(x) <= _LONGEST, "a short text")
    _check(
        line,
        "layers",
        lambda x: (
            isinstance(x, list)
            and bool(x)
            and all(isinstance(y, str) and y.isascii() and y.isdecimal() for y in x)
            and len(set(map(len, x))) == 1
        ),
        "a list of texts of digits, equally long",
    )
    _check(line, "text", lambda x: isinstance(x, list) and all(map(_is_number, x)), "a list of numbers")


def _check(line: dict[str, Any], name: str, right: Callable[[Any], bool], expected: str) -> None:
    if name not in line:
        raise ValueError(f"it has no {name!r}")
    if not right(line[name]):
        raise ValueError(f"{name} is {shorten(line[name])}, not {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not value.strip("01")


def _is_shares(value: Any) -> bool:
    shares = isinstance(value, list) and len(value) in LAYERS
    return shares and all(_is_number(x) and 0 <= x <= 1.001 for x in value)
