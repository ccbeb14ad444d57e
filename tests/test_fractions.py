"""Fractions of token counts are exact."""

from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.fractions import as_fraction, floor_fraction

LARGEST = 80 * 1_048_576


def expected(count, decimal):
    return int(Decimal(decimal) * count)


@pytest.mark.parametrize(
    ("value", "count", "wanted"),
    [(0.29, 100, 29), (0.07, 100, 7), (0.57, 100, 57), (0.1, 9, 0), (0.1, 10, 1), (0.0, 7, 0), (1.0, 7, 7)],
)
def test_decimals_that_floats_get_wrong(value, count, wanted):
    assert floor_fraction(count, value) == wanted
    assert floor_fraction(jnp.int32(count), value) == wanted


def test_plain_floats_would_not_do():
    assert int(0.29 * 100) == 28


@settings(max_examples=25, deadline=None, derandomize=True)
@given(places=st.integers(0, 10_000), count=st.integers(0, LARGEST))
def test_every_decimal_of_four_places(places, count):
    text = f"{places / 10_000:.4f}"
    wanted = expected(count, text)
    assert floor_fraction(count, float(text)) == wanted
    assert int(floor_fraction(jnp.int32(count), float(text))) == wanted


def test_arrays_of_counts_do_not_overflow():
    counts = np.array([1, 9_999, 10_000, 10_001, 2**24 + 1, LARGEST], np.int32)
    for text in ("0.0001", "0.29", "0.3333", "0.9999", "1.0"):
        result = floor_fraction(jnp.asarray(counts), float(text))
        assert result.dtype == jnp.int32
        assert result.tolist() == [expected(int(c), text) for c in counts]


def test_integers_stay_integers():
    assert isinstance(floor_fraction(10, 0.5), int)


def test_as_fraction():
    assert as_fraction(0.1).as_integer_ratio() == (1, 10)
    assert as_fraction(1 / 3).as_integer_ratio() == (1, 3)
    assert as_fraction(1).as_integer_ratio() == (1, 1)
