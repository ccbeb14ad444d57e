"""Column statistics against attention maps in float64; rows outside the slice, padding included, do not count."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.kernels.column_statistics import column_statistics, xla

BLOCK = 8
THRESHOLD = 0.01
SHAPES = [(2, 19, 4, 2, 4), (2, 5, 2, 1, 4), (2, 40, 3, 3, 4)]  # batch, length, heads, kv_heads, head_dim
quick = settings(max_examples=20, deadline=None, derandomize=True)


def maps(query, key, scale=None):
    """Causal attention probabilities, float64 [batch, heads, length, length]."""
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, length, heads, head_dim = q.shape
    out = np.zeros((batch, heads, length, length))
    for b in range(batch):
        for h in range(heads):
            logits = q[b, :, h] @ k[b, :, h // (heads // k.shape[2])].T * (scale or head_dim**-0.5)
            for t in range(length):
                weights = np.exp(logits[t, : t + 1] - logits[t, : t + 1].max())
                out[b, h, t, : t + 1] = weights / weights.sum()
    return out


def check(statistics, attention, first, count, threshold=THRESHOLD):
    for b in range(len(first)):
        for h in range(attention.shape[1]):
            rows = attention[b, h, first[b] : first[b] + count[b]]
            np.testing.assert_allclose(statistics.sums[b, h], rows.sum(0), rtol=0, atol=1e-5)
            causal = np.arange(rows.shape[1]) <= np.arange(first[b], first[b] + count[b])[:, None]
            ratio = rows / rows.max(1, keepdims=True)
            # Exact, but for entries within rounding of the threshold.
            at_least = np.sum((ratio >= threshold * (1 + 1e-6)) & causal)
            at_most = np.sum((ratio >= threshold * (1 - 1e-6)) & causal)
            assert at_least <= statistics.counts[b, h] <= at_most


@functools.cache
def compiled(implementation, block=BLOCK, threshold=THRESHOLD, scale=None):
    def run(*arguments):
        with mock.patch.object(xla, "_BLOCK", block):  # read while tracing
            return column_statistics(*arguments, threshold=threshold, scale=scale, implementation=implementation)

    return jax.jit(run)


def inputs(shape, seed=0, dtype=jnp.float32):
    batch, length, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    query = 3 * rng.normal(size=(batch, length, heads, head_dim))  # spread the logits over the threshold
    return jnp.asarray(query, dtype), jnp.asarray(rng.normal(size=(batch, length, kv_heads, head_dim)), dtype)


@st.composite
def cases(draw, shapes=tuple(SHAPES)):
    """A shape and a slice for each row of the batch, with a liking for block edges, the end and the whole prompt."""
    shape = draw(st.sampled_from(shapes))
    batch, length = shape[:2]
    first, count = np.zeros((2, batch), np.int32)
    for b in range(batch):
        edges = [n for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, length) if n <= length]
        count[b] = draw(st.sampled_from(edges) | st.integers(1, length))
        last = length - int(count[b])
        first[b] = draw(st.sampled_from([0, last]) | st.integers(0, last))
    return shape, first, count


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@quick
@given(case=cases(), seed=st.integers(0, 5))
def test_formula(implementation, case, seed):
    shape, first, count = case
    q, k = inputs(shape, seed)
    statistics = compiled(implementation)(q, k, first, count)
    assert statistics.sums.dtype == statistics.counts.dtype == jnp.float32
    check(statistics, maps(q, k), first, count)


def test_the_threshold_separates_entries():
    q, k = inputs(SHAPES[2])
    first, count = np.zeros(2, np.int32), np.full(2, 40, np.int32)
    counts = compiled("xla")(q, k, first, count).counts
    assert counts.min() > 40  # more than the maxima
    assert counts.max() < 40 * 41 / 2  # fewer than everything


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@quick
@given(case=cases(shapes=(SHAPES[0],)))
def test_rows_after_the_slice_may_hold_nan(implementation, case):
    shape, first, count = case
    q, k = inputs(shape)
    later = (np.arange(shape[1]) >= (first + count)[:, None])[..., None, None]
    run = compiled(implementation)
    clean = run(q, k, first, count)
    dirty = run(jnp.where(later, jnp.nan, q), jnp.where(later, jnp.nan, k), first, count)
    for actual, wanted in zip(dirty, clean):
        np.testing.assert_array_equal(actual, wanted)


def test_columns_after_the_slice_are_zero():
    q, k = inputs(SHAPES[0])
    sums = compiled("xla")(q, k, np.array([3, 0], np.int32), np.array([9, 1], np.int32)).sums
    assert not np.any(sums[0, :, 12:])
    np.testing.assert_array_equal(sums[1], np.broadcast_to(np.arange(19) == 0, (4, 19)))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("threshold", "scale"), [(0.3, None), (1.0, None), (0.01, 0.2)])
def test_threshold_and_scale(implementation, threshold, scale):
    q, k = inputs(SHAPES[0])
    first, count = np.array([2, 10], np.int32), np.array([17, 9], np.int32)
    statistics = compiled(implementation, threshold=threshold, scale=scale)(q, k, first, count)
    check(statistics, maps(q, k, scale), first, count, threshold)
    if threshold == 1:
        np.testing.assert_array_equal(statistics.counts, np.broadcast_to(count[:, None], (2, 4)))


def test_the_real_block_at_its_edges():
    shape = (3, 150, 2, 1, 4)
    q, k = inputs(shape)
    first, count = np.array([0, 86, 149], np.int32), np.array([64, 64, 1], np.int32)
    check(compiled("xla", block=xla._BLOCK)(q, k, first, count), maps(q, k), first, count)


def test_bfloat16_is_scored_in_float32():
    q, k = inputs(SHAPES[0], dtype=jnp.bfloat16)
    first, count = np.array([2, 10], np.int32), np.array([17, 9], np.int32)
    for implementation in ("xla", "reference"):
        statistics = compiled(implementation)(q, k, first, count)
        assert statistics.sums.dtype == jnp.float32
        check(statistics, maps(q, k), first, count)


@quick
@given(case=cases(shapes=(SHAPES[0],)))
def test_a_row_of_a_batch_equals_the_row_alone(case):
    shape, first, count = case
    q, k = inputs(shape)
    together = compiled("xla")(q, k, first, count)
    for row in range(shape[0]):
        alone = compiled("xla")(*(x[row : row + 1] for x in (q, k, first, count)))
        for actual, wanted in zip(together, alone):
            np.testing.assert_array_equal(actual[row], wanted[0])


def test_a_step_makes_one_block_of_rows():
    length = 1024
    q, k = inputs((1, length, 2, 1, 4))
    one = jnp.ones(1, jnp.int32)
    memory = jax.jit(column_statistics).lower(q, k, one, one).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length * 4 / 2  # of one head's map


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 2, 8), (1, 5, 2, 8), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (2,), (1,)), {}, "must be"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"threshold": 0.0}, "threshold 0.0"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"threshold": 1.5}, "threshold 1.5"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"implementation": "cuda"}, "'cuda' is not one of"),
    ],
)
def test_errors(shapes, options, message):
    q, k, first, count = shapes
    with pytest.raises(ValueError, match=message):
        column_statistics(
            jnp.zeros(q), jnp.zeros(k), jnp.zeros(first, jnp.int32), jnp.zeros(count, jnp.int32), **options
        )
