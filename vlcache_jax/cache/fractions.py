"""Exact integer parts of fractions of token counts: floats would lose a slot at 0.29 * 100."""

import fractions
from typing import Any, TypeVar

import jax

Count = TypeVar("Count", bound=int | jax.Array)

_DENOMINATOR = 10_000


def as_fraction(value: float) -> fractions.Fraction:
    """The nearest fraction with a denominator of at most 10,000."""
    return fractions.Fraction(value).limit_denominator(_DENOMINATOR)


def floor_fraction(count: Count, value: float) -> Count:
    """floor(value * count) for `value` in [0, 1], exact for the decimal of up to four places that it stands for.

    Works on Python integers and on i32 arrays; no product exceeds max(count, 1e8).

    Example:
      >>> floor_fraction(100, 0.29), int(0.29 * 100)
      (29, 28)
    """
    part = as_fraction(value)
    whole: Any = count  # the same expression on integers and arrays
    return whole // part.denominator * part.numerator + (count % part.denominator * part.numerator // part.denominator)
