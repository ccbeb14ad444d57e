"""Decode attention against the formula in float64: ragged segments, shared lanes, and slots that must not be read."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.kernels.decode_attention import decode_attention, xla

BLOCK = 16
# (batch, heads, segments of a row, lanes, slots, head_dim); one segment: the heads of a row share it.
SHAPES = [
    (2, 4, 2, 2, 40, 4),  # per head
    (3, 4, 1, 2, 40, 4),  # shared
    (2, 6, 2, 1, 72, 4),  # two KV heads in one lane
    (2, 4, 4, 2, 40, 8),  # MHA, two KV heads in each lane
    (2, 2, 2, 2, 9, 4),  # a store smaller than a block
]
quick = settings(max_examples=15, deadline=None, derandomize=True)


def kv_heads_of(shape):
    return shape[3] if shape[2] == 1 else shape[2]


def expected(query, keys, values, offsets, lengths, kv_heads, scale=None):
    q, k, v = (np.asarray(x, np.float64) for x in (query, keys, values))
    batch, heads, head_dim = q.shape
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for b in range(batch):
        for h in range(heads):
            kv_head = h // (heads // kv_heads)
            lane = kv_head * k.shape[1] // kv_heads
            segment = kv_head if offsets.shape[1] > 1 else 0
            first, length = offsets[b, segment], lengths[b, segment]
            if length == 0:
                continue
            logits = k[b, lane, first : first + length] @ q[b, h] * (scale or head_dim**-0.5)
            lse[b, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            out[b, h] = np.exp(logits - lse[b, h]) @ v[b, lane, first : first + length]
    return out, lse


@functools.cache
def compiled(implementation, block=BLOCK, scale=None):
    def run(*arguments):
        with mock.patch.object(xla, "_BLOCK", block):  # read while tracing
            return decode_attention(*arguments, scale=scale, implementation=implementation)

    return jax.jit(run)


def inputs(shape, seed=0, dtype=jnp.float32):
    batch, heads, _, lanes, slots, head_dim = shape
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, head_dim), (batch, lanes, slots, head_dim), (batch, lanes, slots, head_dim)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@st.composite
def cases(draw, shapes=tuple(SHAPES)):
    """A shape, offsets and lengths: anything, with a liking for empty segments, block edges and the store's end."""
    shape = draw(st.sampled_from(shapes))
    batch, _, segments, _, slots, _ = shape
    offsets, lengths = np.zeros((2, batch, segments), np.int32)
    for b in range(batch):
        for s in range(segments):
            edges = [n for n in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, slots) if n <= slots]
            lengths[b, s] = draw(st.sampled_from(edges) | st.integers(0, slots))
            last = slots - int(lengths[b, s])
            offsets[b, s] = draw(st.sampled_from([0, last]) | st.integers(0, last))
    return shape, offsets, lengths


def inside(shape, offsets, lengths):
    """bool [batch, lanes, slots, 1]: slots of any segment."""
    batch, _, segments, lanes, slots, _ = shape
    mask = np.zeros((batch, lanes, slots, 1), bool)
    for b in range(batch):
        for s in range(segments):
            chosen = range(lanes) if segments == 1 else [s * lanes // segments]
            for lane in chosen:
                mask[b, lane, offsets[b, s] : offsets[b, s] + lengths[b, s]] = True
    return mask


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@quick
@given(case=cases(), seed=st.integers(0, 5))
def test_formula(implementation, case, seed):
    shape, offsets, lengths = case
    q, k, v = inputs(shape, seed)
    out, lse = compiled(implementation)(q, k, v, offsets, lengths)
    wanted, wanted_lse = expected(q, k, v, offsets, lengths, kv_heads_of(shape))
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@quick
@given(case=cases())
def test_slots_outside_the_segments_are_never_read(implementation, case):
    shape, offsets, lengths = case
    q, k, v = inputs(shape)
    mask = inside(shape, offsets, lengths)
    run = compiled(implementation)
    clean = run(q, jnp.where(mask, k, 0), jnp.where(mask, v, 0), offsets, lengths)
    dirty = run(q, jnp.where(mask, k, jnp.nan), jnp.where(mask, v, jnp.nan), offsets, lengths)
    for actual, wanted in zip(dirty, clean):
        np.testing.assert_array_equal(actual, wanted)


def test_heads_that_share_a_lane_do_not_read_one_another():
    shape = SHAPES[2]
    q, k, v = inputs(shape)
    offsets, lengths = np.array([[0, 24], [24, 0]], np.int32), np.full((2, 2), 20, np.int32)
    clean, _ = compiled("xla")(q, k, v, offsets, lengths)
    other = (np.arange(72) >= 24)[:, None]
    dirty, _ = compiled("xla")(q, jnp.where(other, jnp.nan, k), jnp.where(other, jnp.nan, v), offsets, lengths)
    np.testing.assert_array_equal(dirty[0, :3], clean[0, :3])  # KV head 0 of row 0 lies in slots 0..19
    np.testing.assert_array_equal(dirty[1, 3:], clean[1, 3:])


@quick
@given(case=cases(shapes=(SHAPES[0], SHAPES[1])), block=st.sampled_from([BLOCK, 128]))
def test_a_row_of_a_batch_equals_the_row_alone(case, block):
    shape, offsets, lengths = case
    q, k, v = inputs(shape)
    run = compiled("xla", block)
    together = run(q, k, v, offsets, lengths)
    for row in range(shape[0]):
        alone = run(*(x[row : row + 1] for x in (q, k, v, offsets, lengths)))
        for actual, wanted in zip(together, alone):
            np.testing.assert_array_equal(actual[row], wanted[0])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@quick
@given(case=cases(shapes=(SHAPES[0], SHAPES[2])))
def test_bfloat16(implementation, case):
    shape, offsets, lengths = case
    q, k, v = inputs(shape, dtype=jnp.bfloat16)
    out, lse = compiled(implementation)(q, k, v, offsets, lengths)
    wanted, wanted_lse = expected(q, k, v, offsets, lengths, kv_heads_of(shape))
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1.5e-2)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)  # logits accumulate in float32


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_real_block_and_scale(implementation):
    shape = (2, 4, 2, 2, 300, 8)
    q, k, v = inputs(shape)
    offsets, lengths = np.array([[0, 172], [44, 299]], np.int32), np.array([[129, 128], [256, 1]], np.int32)
    out, lse = compiled(implementation, block=xla._BLOCK, scale=0.7)(q, k, v, offsets, lengths)
    wanted, wanted_lse = expected(q, k, v, offsets, lengths, 2, scale=0.7)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = inputs(SHAPES[1])
    offsets, lengths = np.zeros((3, 1), np.int32), np.full((3, 1), 40, np.int32)
    out, lse = compiled("xla")(q * 1e3, k * 1e3, v, offsets, lengths)
    wanted, wanted_lse = expected(q * 1e3, k * 1e3, v, offsets, lengths, 2)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


def _steps(lengths, slots):
    """Iterations of the loop."""
    uppers = []
    loop = jax.lax.fori_loop

    def recorder(lower, upper, body, init):
        uppers.append(int(upper) - int(lower))
        return loop(lower, upper, body, init)

    q, k, v = inputs((len(lengths), 2, 1, 1, slots, 4))
    with mock.patch.object(jax.lax, "fori_loop", recorder):
        decode_attention(q, k, v, jnp.zeros((len(lengths), 1), jnp.int32), jnp.asarray(lengths, jnp.int32)[:, None])
    (steps,) = uppers
    return steps


@pytest.mark.parametrize(
    ("lengths", "steps"), [((0, 0), 0), ((0, 1), 1), ((128, 1), 1), ((129, 0), 2), ((1600, 3), 13)]
)
def test_work_follows_the_longest_segment(lengths, steps):
    assert _steps(lengths, slots=16384) == steps


def test_a_step_touches_one_block_of_the_store():
    slots = 4096
    q, k, v = inputs((2, 4, 1, 2, slots, 4))
    one = jnp.ones((2, 1), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda *a: decode_attention(*a, implementation="xla"))(q, k, v, one, one)
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "while"]
    made = [out.aval.shape for e in loop.params["body_jaxpr"].jaxpr.eqns for out in e.outvars]
    assert any(128 in shape for shape in made)
    assert not any(max(shape, default=0) >= slots for shape in made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 8, 4), (1, 1), (1, 1)), "do not fit"),
        (((1, 2, 4), (2, 1, 9, 4), (2, 1, 9, 4), (1, 1), (1, 1)), "do not fit"),
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 9, 4), (1, 1), (1, 2)), "want two of"),
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 9, 4), (1,), (1,)), "want two of"),
        (((1, 3, 4), (1, 2, 9, 4), (1, 2, 9, 4), (1, 1), (1, 1)), "do not divide"),
        (((1, 4, 4), (1, 4, 9, 4), (1, 4, 9, 4), (1, 2), (1, 2)), "do not divide"),
    ],
)
def test_errors(arguments, message):
    q, k, v, offsets, lengths = arguments
    with pytest.raises(ValueError, match=message):
        decode_attention(
            jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), jnp.zeros(offsets, jnp.int32), jnp.zeros(lengths, jnp.int32)
        )


def test_unknown_implementation():
    q, k, v = inputs(SHAPES[0])
    zero = jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        decode_attention(q, k, v, zero, zero, implementation="cuda")
