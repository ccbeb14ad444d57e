"""Column statistics against attention maps in float64: one suite for all implementations.

Rows outside the slice and columns after it do not count and are never looked at, padding included.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from tiers import later

from vlcache_jax.kernels.attention import Mask
from vlcache_jax.kernels.column_statistics import column_statistics, pallas_tpu, xla, xla_columns

BLOCK = 16  # rows of a block in these tests
THRESHOLD = 0.01
# batch, length, heads, kv_heads, head_dim; the last has several blocks of columns and a ragged one
SHAPES = [(2, 19, 4, 2, 4), (2, 5, 2, 1, 4), (2, 40, 3, 3, 4), (2, 150, 4, 2, 4)]
IMPLEMENTATIONS = ["reference", "xla", "xla_columns", "pallas_tpu"]
TPU_INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
quick = settings(max_examples=8, deadline=None, derandomize=True)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def maps(query, key, scale=None, last=None):
    """Causal logits and attention probabilities, float64 [batch, heads, length, length]; or up to a row's `last`."""
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    length, heads, head_dim = q.shape[1:]
    k = np.repeat(k, heads // k.shape[2], axis=2)
    logits = np.einsum("bthd,bshd->bhts", q, k) * (scale or head_dim**-0.5)
    last = np.arange(length)[None] if last is None else last
    logits = np.where((np.arange(length) <= last[..., None])[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return logits, weights / weights.sum(-1, keepdims=True)


def check(statistics, maps, first, count, threshold=THRESHOLD, *, bounded, atol=1e-5):
    """Against `maps`; `bounded`: row statistics start at the slice's first row."""
    logits, attention = maps
    for b, h in np.ndindex(attention.shape[:2]):
        chosen = slice(first[b], first[b] + count[b])
        rows, row_logits = attention[b, h, chosen], logits[b, h, chosen]
        np.testing.assert_allclose(statistics.sums[b, h], rows.sum(0), rtol=1e-5, atol=atol)
        highest = rows.max(0, initial=0)
        if statistics.column_maximum is not None:
            np.testing.assert_allclose(statistics.column_maximum[b, h], highest, rtol=1e-5, atol=atol)
        if statistics.counts is not None:
            causal = row_logits > -np.inf
            ratio = rows / rows.max(1, keepdims=True, initial=0)
            # Exact, but for entries within rounding of the threshold.
            at_least = np.sum((ratio >= threshold * (1 + 1e-5)) & causal)
            at_most = np.sum((ratio >= threshold * (1 - 1e-5)) & causal)
            assert at_least <= float(statistics.counts[b, h]) <= at_most
        wanted = np.full((2, statistics.lse.shape[1]), -np.inf)
        at = slice(0, count[b]) if bounded else chosen
        wanted[1, at] = row_logits.max(1, initial=-np.inf)
        wanted[0, at] = wanted[1, at] + np.log(np.exp(row_logits - wanted[1, at][:, None]).sum(1))
        np.testing.assert_allclose(statistics.lse[b, :, h], wanted[0], rtol=1e-5, atol=1e-5)
        if statistics.maximum is not None:
            np.testing.assert_allclose(statistics.maximum[b, :, h], wanted[1], rtol=1e-5, atol=1e-5)


@functools.cache
def compiled(implementation, interpret=True, small=True, **options):
    def run(*arguments, **more):
        with (  # read while tracing
            mock.patch.object(xla, "_BLOCK", BLOCK if small else xla._BLOCK),
            mock.patch.multiple(xla_columns, _ROWS=BLOCK, _COLUMNS=32, _AT_ONCE=0) if small else mock.MagicMock(),
            mock.patch.multiple(pallas_tpu, _ROWS=BLOCK if interpret is True else 64, _COLUMNS=128)
            if small
            else mock.MagicMock(),
        ):
            return column_statistics(*arguments, **more, **options, implementation=implementation, interpret=interpret)

    return jax.jit(run)


def inputs(shape, seed=0, dtype=jnp.float32):
    batch, length, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    query = 3 * rng.normal(size=(batch, length, heads, head_dim))  # spread the logits over the threshold
    return jnp.asarray(query, dtype), jnp.asarray(rng.normal(size=(batch, length, kv_heads, head_dim)), dtype)


def row_statistics(query, key):
    """The lse and maximum of every row, f32 [batch, length, heads]."""
    logits, _ = maps(query, key)
    highest = logits.max(-1)
    lse = highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
    return (np.asarray(x.swapaxes(1, 2), np.float32) for x in (lse, highest))


@st.composite
def cases(draw, shapes=tuple(SHAPES), most=None):
    """A shape and a slice for each row of the batch, with a liking for block edges, the end and the whole prompt."""
    shape = draw(st.sampled_from(shapes))
    batch, length = shape[:2]
    first, count = np.zeros((2, batch), np.int32)
    for b in range(batch):
        limit = min(most or length, length)
        edges = [n for n in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 127, 128, 129, limit) if n <= limit]
        count[b] = draw(st.sampled_from(edges) | st.integers(0, limit))
        last = length - int(count[b])
        first[b] = draw(st.sampled_from([0, last]) | st.integers(0, last))
    return shape, first, count


@every_implementation
@quick
@given(case=cases(), seed=st.integers(0, 3), bound=st.sampled_from([None, 8]))
def test_rows_that_see_later_columns(implementation, case, seed, bound):
    """Images whose tokens see each other; the one of the second row ends with the prompt."""
    shape, first, count = case
    q, k = inputs(shape, seed)
    blocks = np.full(shape[:2], -1, np.int32)
    blocks[0, 1:4], blocks[0, 4:17], blocks[1:, -9:] = 0, 1, 0
    mask = Mask(blocks=jnp.asarray(blocks))
    last, seen = mask.last(), np.asarray(mask.as_array(shape[1]))
    np.testing.assert_array_equal(mask.first(), seen.argmax(axis=1))
    np.testing.assert_array_equal(last, shape[1] - 1 - seen[..., ::-1].argmax(axis=-1))
    count = count if bound is None else np.minimum(count, bound)
    statistics = compiled(implementation, column_maximum=True, max_rows=bound)(q, k, first, count, last=last)
    check(statistics, maps(q, k, last=np.asarray(last)), first, count, bounded=bound is not None)


@every_implementation
@quick
@given(case=cases(), seed=st.integers(0, 3))
def test_formula(implementation, case, seed):
    shape, first, count = case
    q, k = inputs(shape, seed)
    statistics = compiled(implementation, column_maximum=True)(q, k, first, count)
    assert all(x.dtype == jnp.float32 for x in statistics)
    check(statistics, maps(q, k), first, count, bounded=False)


@every_implementation
@quick
@given(case=cases(most=21))
def test_bounded_rows(implementation, case):
    shape, first, count = case
    q, k = inputs(shape)
    statistics = compiled(implementation, column_maximum=True, max_rows=21)(q, k, first, count)
    assert statistics.lse.shape == (shape[0], min(21, shape[1]), shape[2])
    check(statistics, maps(q, k), first, count, bounded=True)


def test_rows_beyond_the_bound_are_left_out():
    q, k = inputs(SHAPES[2])
    first, count = np.array([3, 0], np.int32), np.array([30, 4], np.int32)
    statistics = compiled("xla", max_rows=8)(q, k, first, count)
    check(statistics, maps(q, k), first, np.minimum(count, 8), bounded=True)


@every_implementation
@pytest.mark.parametrize("max_rows", [None, 21])
@pytest.mark.parametrize("names", [("lse", "maximum"), *later(("lse",), ("maximum",))])
def test_given_row_statistics(implementation, max_rows, names):
    q, k = inputs(SHAPES[3])
    first, count = np.array([129, 20], np.int32), np.array([21, 17], np.int32)
    given_rows = dict(zip(("lse", "maximum"), row_statistics(q, k)))
    given_rows = {name: given_rows[name] for name in names}
    statistics = compiled(implementation, max_rows=max_rows)(q, k, first, count, **given_rows)
    check(statistics, maps(q, k), first, count, bounded=max_rows is not None)
    if implementation == "reference":
        return
    # They are used, not computed again.
    for name, value in given_rows.items():
        other = compiled(implementation, max_rows=max_rows)(q, k, first, count, **{**given_rows, name: value + 1})
        before, after = (np.asarray(getattr(x, name)) for x in (statistics, other))
        np.testing.assert_allclose(after[np.isfinite(after)], before[np.isfinite(before)] + 1, atol=1e-4)


def test_known_row_statistics_take_one_product_with_the_keys():
    q, k = inputs(SHAPES[0])
    one = jnp.ones(2, jnp.int32)
    lse = jnp.zeros(q.shape[:3])

    def calls(**options):
        run = functools.partial(column_statistics, implementation="pallas_tpu", max_rows=8, **options)
        return str(jax.make_jaxpr(run)(q, k, one, one)).count("pallas_call[")

    assert calls() == 2
    assert calls(lse=lse) == 2  # the counts need the maximum
    assert calls(lse=lse, maximum=lse) == calls(lse=lse, threshold=None) == 1


@every_implementation
def test_without_threshold_nothing_is_counted(implementation):
    q, k = inputs(SHAPES[0])
    first, count = np.array([2, 10], np.int32), np.array([17, 9], np.int32)
    statistics = compiled(implementation, threshold=None)(q, k, first, count)
    assert statistics.counts is None
    assert statistics.column_maximum is None
    check(statistics, maps(q, k), first, count, bounded=False)


def test_the_threshold_separates_entries():
    q, k = inputs(SHAPES[2])
    first, count = np.zeros(2, np.int32), np.full(2, 40, np.int32)
    counts = compiled("xla")(q, k, first, count).counts
    assert counts.min() > 40  # more than the maxima
    assert counts.max() < 40 * 41 / 2  # fewer than everything


@every_implementation
@quick
@given(case=cases(shapes=(SHAPES[0], SHAPES[3])))
def test_other_rows_and_later_columns_may_hold_nan(implementation, case):
    shape, first, count = case
    q, k = inputs(shape)
    index = np.arange(shape[1])
    later = (index >= (first + count)[:, None])[..., None, None]
    outside = later | (index < first[:, None])[..., None, None]
    run = compiled(implementation, column_maximum=True)
    clean = run(q, k, first, count)
    dirty = run(jnp.where(outside, jnp.nan, q), jnp.where(later, jnp.nan, k), first, count)
    for actual, wanted in zip(dirty, clean):
        np.testing.assert_array_equal(actual, wanted)


@every_implementation
def test_columns_after_the_slice_are_zero(implementation):
    q, k = inputs(SHAPES[0])
    sums = compiled(implementation)(q, k, np.array([3, 0], np.int32), np.array([9, 1], np.int32)).sums
    assert not np.any(sums[0, :, 12:])
    np.testing.assert_allclose(sums[1], np.broadcast_to(np.arange(19) == 0, (4, 19)), atol=1e-6)


@every_implementation
@pytest.mark.parametrize(("threshold", "scale"), [(0.3, None), (1.0, None), (0.01, 0.2)])
def test_threshold_and_scale(implementation, threshold, scale):
    q, k = inputs(SHAPES[0])
    first, count = np.array([2, 10], np.int32), np.array([17, 9], np.int32)
    statistics = compiled(implementation, threshold=threshold, scale=scale)(q, k, first, count)
    check(statistics, maps(q, k, scale), first, count, threshold, bounded=False)
    if threshold == 1:
        np.testing.assert_array_equal(statistics.counts, np.broadcast_to(count[:, None], (2, 4)))


@every_implementation
@pytest.mark.parametrize("max_rows", [None, 64])
def test_the_real_blocks_at_their_edges(implementation, max_rows):
    q, k = inputs((3, 1100, 2, 1, 4))
    first, count = np.array([0, 960, 1036], np.int32), np.array([64, 64, 63], np.int32)
    if max_rows is None:
        first, count = np.array([0, 1, 1099], np.int32), np.array([1025, 129, 1], np.int32)
    statistics = compiled(implementation, small=False, max_rows=max_rows)(q, k, first, count)
    check(statistics, maps(q, k), first, count, bounded=max_rows is not None, atol=1e-4)


@every_implementation
def test_bfloat16_is_scored_in_float32(implementation):
    """Products of bfloat16 numbers are exact in float32, so nothing but the inputs is rounded."""
    q, k = inputs(SHAPES[3], dtype=jnp.bfloat16)
    first, count = np.array([2, 10], np.int32), np.array([147, 9], np.int32)
    statistics = compiled(implementation)(q, k, first, count)
    assert statistics.sums.dtype == jnp.float32
    check(statistics, maps(q, k), first, count, bounded=False)


@every_implementation
def test_a_row_of_a_batch_equals_the_row_alone_and_a_run_equals_the_next(implementation):
    q, k = inputs(SHAPES[3])
    run = compiled(implementation, max_rows=40)
    for first, count in (([3, 120], [17, 30]), ([0, 149], [0, 1]), ([0, 5], [40, 40])):
        arguments = q, k, np.array(first, np.int32), np.array(count, np.int32)
        together, again = run(*arguments), run(*arguments)
        for row in range(2):
            alone = run(*(x[row : row + 1] for x in arguments))
            for name in ("sums", "counts", "lse", "maximum"):
                # Products for all rows of the batch at once may add up in another order.
                tolerance = 1e-5 if implementation == "xla_columns" else 0
                actual, wanted = getattr(together, name)[row], getattr(alone, name)[0]
                np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance)
        jax.tree.map(np.testing.assert_array_equal, together, again)


@pytest.mark.parametrize("max_rows", [None, 24])
@pytest.mark.parametrize("shape", [(2, 150, 2, 1, 4), (1, 256, 1, 1, 64)])
def test_tpu_interpreter(shape, max_rows):
    """No races, no reads of uninitialised memory or out of bounds."""
    q, k = inputs(shape)
    for first, count in (([129, 20], [21, 0]), ([0, 100], [24, 17])):
        first, count = (np.array(x[: shape[0]], np.int32) for x in (first, count))
        run = compiled("pallas_tpu", interpret=TPU_INTERPRETER, max_rows=max_rows, column_maximum=True)
        check(run(q, k, first, count), maps(q, k), first, count, bounded=max_rows is not None)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_lowers_for(platform):
    q, k = inputs((1, 256, 4, 2, 64), dtype=jnp.bfloat16)
    one = jnp.ones(1, jnp.int32)
    for options in ({"max_rows": 50}, {}):
        run = jax.jit(functools.partial(column_statistics, **options))
        text = run.trace(q, k, one, one).lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (platform == "tpu")


@pytest.mark.parametrize("implementation", ["xla", "xla_columns"])
def test_memory_is_that_of_blocks(implementation):
    length = 1024
    q, k = inputs((1, length, 2, 1, 4))
    one = jnp.ones(1, jnp.int32)
    memory = compiled(implementation).lower(q, k, one, one).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length * 4 / 8  # of one head's map


def test_named_implementation_that_cannot():
    one = jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="heads of up to 512, not 1024"):
        column_statistics(jnp.zeros((1, 8, 1, 1024)), jnp.zeros((1, 8, 1, 1024)), one, one, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 2, 8), (1, 5, 2, 8), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1,), (1,)), {}, "does not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (2,), (1,)), {}, "must be"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"threshold": 0.0}, "threshold 0.0"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"threshold": 1.5}, "threshold 1.5"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"max_rows": 0}, "max_rows=0"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"lse": np.zeros((1, 2, 4))}, "lse .* must be .1, 4, 2."),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1,), (1,)), {"implementation": "cuda"}, "'cuda' is not one of"),
    ],
)
def test_errors(shapes, options, message):
    q, k, first, count = shapes
    with pytest.raises(ValueError, match=message):
        column_statistics(
            jnp.zeros(q), jnp.zeros(k), jnp.zeros(first, jnp.int32), jnp.zeros(count, jnp.int32), **options
        )
