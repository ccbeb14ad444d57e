"""MathVista's questions: what is said after each kind of them, and how its answers are scored by rules.

Its files say of each question whether it has choices, and what its answer is: a whole number, a number with so many
decimals, a list, a text. Where a file does not, the right answer tells.
"""

import math
from typing import Any

from vlcache_jax.evaluation.metrics.math_answer import math_answer
from vlcache_jax.evaluation.metrics.numbers import number
from vlcache_jax.evaluation.metrics.option_letter import option_letter
from vlcache_jax.evaluation.sample import Sample

_KINDS = ("integer", "float", "list", "text")
_HINTS = {
    "integer": "\nAnswer the question using a single integer number.",
    "float": "\nAnswer the question using a single floating-point number with {} decimal place{}.",
    "list": "\nAnswer the question using a Python list.",
    "text": "\nAnswer the question using a single word or phrase.",
}
_COUNTS = ("no", "one", "two", "three", "four")


def unit(sample: Sample) -> str:
    """What follows the question where its answer has a unit."""
    found = sample.more.get("unit")
    return f" (Unit: {found})" if found else ""


def hint(sample: Sample) -> str:
    """What follows the question: of which kind the answer is to be."""
    if sample.choices:
        return "\nAnswer with the option's letter from the given choices directly."
    decimals = _precision(sample)
    count = _COUNTS[decimals] if decimals < len(_COUNTS) else str(decimals)
    return _HINTS[_kind(sample)].format(count, "" if decimals == 1 else "s")


def score(answer: str, sample: Sample) -> float:
    """1.0 if an answer is right: see `option_letter` and `math_answer`."""
    if sample.choices:
        return option_letter(answer, sample.answers, sample.choices)
    return max(math_answer(answer, right, _kind(sample), _precision(sample)) for right in sample.answers)


def _kind(sample: Sample) -> Any:
    """One of `_KINDS`."""
    found = sample.more.get("answer_type")
    if found in _KINDS:
        return found
    right = next(iter(sample.answers), "")
    if right.startswith("["):
        return "list"
    return "text" if number(right) is None else "float" if "." in right else "integer"


def _precision(sample: Sample) -> int:
    """Decimals of a float."""
    found = sample.more.get("precision")
    value = number(str(found)) if found is not None else None
    if value is not None and math.isfinite(value):
        return max(0, int(value))
    return len(next(iter(sample.answers), "").partition(".")[2])
