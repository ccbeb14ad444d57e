"""Prefill attention against the formula in float64, for every implementation and at the edges of its chunks."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax.kernels.attention import CAUSAL, FULL, Mask, attention, places_of, splash_tpu, xla, xla_wide
from vlcache_jax.kernels.column_statistics import column_statistics

CHUNK, SPANS = 8, 3
# (batch, length, heads, kv_heads, head_dim). A span is one chunk up to 24 rows, two up to 48, three up to 72.
PLAIN = ["xla", "xla_wide", "reference"]
IMPLEMENTATIONS = [*PLAIN, "splash_tpu"]
SHAPES = [(2, 1, 2, 1, 4), (2, 8, 2, 2, 4), (1, 9, 4, 2, 4), (2, 24, 4, 2, 8), (1, 70, 6, 2, 4), (1, 43, 3, 3, 4)]


def sees(row, column, causal, segments, blocks=None, window=None, apart=False):
    """Of one row of the batch: the rule in words of its own."""
    shared = () if apart else (0,)
    together = blocks is not None and blocks[row] >= 0 and blocks[row] == blocks[column]
    near = window is None or row - column < window
    return (
        near
        and (column <= row or not causal or together)
        and (segments is None or segments[column] in (*shared, segments[row]))
    )


def expected(query, key, value, segments=None, scale=None, causal=True, blocks=None, window=None, apart=False):
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                rules = *(None if x is None else x[b] for x in (segments, blocks)), window
                seen = [j for j in range(length) if sees(t, j, causal, *rules, apart)]
                logits = k[b, seen, h // group] @ q[b, t, h] * (scale or head_dim**-0.5)
                lse[b, t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, seen, h // group]
    return out, lse


@functools.cache
def compiled(implementation, scale=None, with_lse=True):
    def run(query, key, value, mask=CAUSAL):
        with (  # read while tracing
            mock.patch.multiple(xla, _CHUNK=CHUNK, _SPANS=SPANS, _WHOLE=16),
            mock.patch.multiple(xla_wide, _LOGITS=4 * 8 * 4 * 70, _SPANS=SPANS),
            mock.patch.multiple(splash_tpu, _SHORTEST=1, _SHORTEST_FULL=1),
        ):
            return attention(
                query,
                key,
                value,
                mask,
                scale=scale,
                with_lse=with_lse,
                implementation=implementation,
                interpret=True,
            )

    return jax.jit(run)


def inputs(shape, seed=0, dtype=jnp.float32):
    batch, length, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def assert_close(actual, wanted, most, all_of):
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(wanted, np.float64))
    assert np.mean(error <= most) >= 0.99
    assert error.max() <= all_of


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 4, 2, 4)])
def test_formula(shape, implementation):
    q, k, v = inputs(shape)
    out, lse = compiled(implementation)(q, k, v)
    wanted, wanted_lse = expected(q, k, v)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert lse.dtype == jnp.float32
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("implementation", "apart"), [*((x, False) for x in PLAIN), *((x, True) for x in IMPLEMENTATIONS)]
)
@pytest.mark.parametrize("length", [9, 70])
def test_segments(length, implementation, apart, causal):
    q, k, v = inputs((2, length, 4, 2, 4), seed=1)
    shared = length // 3
    # Segment 0, a shared prefix unless they are apart, then three packed segments; the second row has no segment 0.
    packed = 1 + np.arange(length) // (length // 3)
    segments = np.stack([np.where(np.arange(length) < shared, 0, packed), packed]).astype(np.int32)
    out, lse = compiled(implementation)(q, k, v, Mask(causal=causal, segments=segments, apart=apart))
    wanted, wanted_lse = expected(q, k, v, segments, causal=causal, apart=apart)
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)
    for other in ({}, {"segments": segments, "apart": not apart}):  # all of it matters
        assert np.abs(wanted - expected(q, k, v, causal=causal, **other)[0]).max() > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_full(shape, implementation):
    q, k, v = inputs(shape, seed=2)
    out, lse = compiled(implementation)(q, k, v, FULL)
    wanted, wanted_lse = expected(q, k, v, causal=False)
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)
    np.testing.assert_allclose(compiled(implementation, with_lse=False)(q, k, v, FULL)[0], out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1, 2, 2, 0], [1, 1, 1, 0, 2, 0, 2]]])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("blocks", [None, [[-1, 0, 0, 0, -1, 1, 1], [0, 0, 0, -1, -1, -1, -1]]])
@pytest.mark.parametrize("window", [None, 2, 9])
def test_the_meaning_of_a_mask(causal, segments, blocks, window, apart):
    given = {k: None if x is None else jnp.asarray(x) for k, x in (("segments", segments), ("blocks", blocks))}
    mask = Mask(causal=causal, window=window, apart=apart, **given)
    array = np.asarray(mask.as_array(7))
    for row, seen in enumerate(array):
        rules = *(None if x is None else x[row] for x in (segments, blocks)), window
        np.testing.assert_array_equal(seen, [[sees(t, j, causal, *rules, apart) for j in range(7)] for t in range(7)])
    for first, last in ((0, 7), (2, 4), (5, 9)):
        left, right = mask.span(first, last, 7)
        assert not array[:, first:last, :left].any()
        assert not array[:, first:last, right:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("length", "window"), [(9, 1), (70, 5), (70, 33), (43, 100)])
def test_window(length, window, implementation):
    q, k, v = inputs((2, length, 4, 2, 4), seed=3)
    out, lse = compiled(implementation)(q, k, v, Mask(window=window))
    wanted, wanted_lse = expected(q, k, v, window=window)
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 4, 30])
def test_images_that_see_each_other(window, implementation):
    """Two images in one row, one that begins it in the other, as a prefix does; some longer than the window."""
    q, k, v = inputs((2, 70, 4, 2, 4), seed=4)
    blocks = np.full((2, 70), -1, np.int32)
    blocks[0, 3:20], blocks[0, 20:33], blocks[1, :50] = 0, 1, 0
    out, lse = compiled(implementation)(q, k, v, Mask(blocks=jnp.asarray(blocks), window=window))
    wanted, wanted_lse = expected(q, k, v, blocks=blocks, window=window)
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)
    assert np.abs(wanted - expected(q, k, v, window=window)[0]).max() > 0.1


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_window_within_packed_texts(implementation):
    """Texts behind one prefix: each sees what it would see alone, in a window that reaches into the prefix."""
    q, k, v = inputs((1, 70, 4, 2, 4), seed=5)
    segments = np.asarray([0] * 9 + [1] * 20 + [2] * 33 + [3] * 8, np.int32)[None]
    given = jnp.asarray(segments)
    out, lse = compiled(implementation)(q, k, v, Mask(segments=given, window=12, places=places_of(given)))
    for segment in (0, 1, 2, 3):
        own = np.flatnonzero((segments[0] == 0) | (segments[0] == segment))
        wanted, wanted_lse = expected(*(np.asarray(x)[:, own] for x in (q, k, v)), window=12)
        asked = segments[0, own] == segment
        assert_close(out[:, own[asked]], wanted[:, asked], 2e-6, 1e-5)
        assert_close(lse[:, own[asked]], wanted_lse[:, asked], 2e-6, 1e-5)


def test_long_prompts_with_a_window_on_tpus_need_not_make_every_block():
    """Splash attention's blocks of a mask: those that are asked for equal the definition, and are one of a few."""
    shape, window = (512, 512), 200
    mask, array = splash_tpu._WindowMask(shape, (window - 1, 0), 0), np.asarray(Mask(window=window).as_array(512)[0])
    for top in range(0, 512, 128):
        for left in range(0, 512, 64):
            found = mask[top : top + 128, left : left + 64]
            np.testing.assert_array_equal(found, array[top : top + 128, left : left + 64])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale(implementation):
    q, k, v = inputs(SHAPES[2])
    out, lse = compiled(implementation, scale=0.7)(q, k, v)
    wanted, wanted_lse = expected(q, k, v, scale=0.7)
    assert_close(out, wanted, 2e-6, 1e-5)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    q, k, v = inputs(SHAPES[4], dtype=jnp.bfloat16)
    out, lse = compiled(implementation)(q, k, v)
    wanted, wanted_lse = expected(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert_close(out, wanted, 8e-3, 2e-2)
    assert_close(lse, wanted_lse, 2e-6, 1e-5)  # logits accumulate in float32


@pytest.mark.parametrize("mask", ["full", "segments"])
@pytest.mark.parametrize("implementation", ["xla", "xla_wide"])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]])
def test_gradients_of_xla_equal_those_of_the_reference(shape, implementation, mask):
    q, k, v = inputs(shape, seed=3)
    segments = jnp.asarray(np.arange(shape[1]) // 5, jnp.int32)[None].repeat(shape[0], 0)
    mask = FULL if mask == "full" else Mask(segments=segments)
    rng = np.random.default_rng(4)
    weight, lse_weight = rng.normal(size=q.shape), rng.normal(size=q.shape[:3])

    def loss(implementation, q, k, v):
        out, lse = compiled(implementation)(q, k, v, mask)
        return jnp.sum(out * weight) + jnp.sum(lse * lse_weight)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(q, k, v)
        for name in (implementation, "reference")
    ]
    for actual, wanted in zip(*gradients):
        assert np.abs(wanted).max() > 0.1
        assert_close(actual, wanted, 1e-5, 5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES[2:5])
def test_without_lse(shape, implementation):
    out, lse = compiled(implementation, with_lse=False)(*inputs(shape))
    assert lse is None
    np.testing.assert_allclose(out, compiled(implementation)(*inputs(shape))[0], rtol=0, atol=1e-6)


_RUNS = (jnp.arange(150) // 50)[None]
_MASKS = {
    "causal": CAUSAL,
    "images": Mask(blocks=jnp.where(jnp.arange(150) % 50 > 9, _RUNS, -1)),
    "apart": Mask(causal=False, segments=_RUNS, apart=True),
}


@pytest.mark.parametrize("mask", _MASKS)
@pytest.mark.parametrize("with_lse", [True, False])
def test_gradients_of_splash_attention(with_lse, mask):
    q, k, v = inputs((1, 150, 2, 1, 8), seed=3)
    rng = np.random.default_rng(4)
    weight, lse_weight = rng.normal(size=q.shape), rng.normal(size=q.shape[:3])
    mask = _MASKS[mask]

    def loss(implementation, q, k, v):
        out, lse = compiled(implementation, with_lse=with_lse)(q, k, v, mask)
        return jnp.sum(out * weight) + (jnp.sum(lse * lse_weight) if with_lse else 0)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(q, k, v)
        for name in ("splash_tpu", "reference")
    ]
    for actual, wanted in zip(*gradients):
        assert np.abs(wanted).max() > 0.1
        assert_close(actual, wanted, 1e-5, 5e-5)


@pytest.mark.parametrize("with_lse", [True, False])
def test_the_default_is_differentiable_and_lowers_for_every_platform(with_lse):
    """All branches are traced and differentiated, whatever the platform; a machine without a GPU has no cuDNN."""
    q, k, v = inputs((1, 128, 2, 1, 64), dtype=jnp.bfloat16)

    def loss(q, k, v, **options):
        out, lse = attention(q, k, v, with_lse=with_lse, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2) + (jnp.sum(lse) if with_lse else 0)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    wanted = jax.jit(jax.grad(functools.partial(loss, implementation="xla"), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, gradient(q, k, v), wanted)
    for platform in ("cpu", "cuda", "tpu"):
        text = gradient.trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (platform == "tpu")


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_defaults_work_inside_shard_map(check_vma):
    """Pallas calls, which cannot be checked, give way."""
    q, k, v = inputs((2, 128, 4, 2, 8))
    first, count = jnp.array([100, 3]), jnp.array([28, 100])

    def run(q, k, v, first, count):
        return attention(q, k, v), column_statistics(q, k, first, count)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma))
    wanted = jax.jit(run)(q, k, v, first, count)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), sharded(q, k, v, first, count), wanted
    )


@pytest.mark.parametrize("name", ["cudnn", "splash_tpu"])
def test_a_tuple_of_names_is_tried_in_turn(name):
    q, k, v = inputs((1, 128, 2, 1, 8))
    mask = Mask(segments=jnp.ones((1, 128), jnp.int32))
    with pytest.raises(NotImplementedError, match="segments"):
        attention(q, k, v, mask, with_lse=False, implementation=name)
    with pytest.raises(NotImplementedError, match=f"no implementation serves the arguments. {name}: .*segments"):
        attention(q, k, v, mask, with_lse=False, implementation=(name,))
    out, _ = attention(q, k, v, mask, with_lse=False, implementation=(name, "xla"))
    np.testing.assert_array_equal(out, attention(q, k, v, mask, implementation="xla")[0])


def test_named_implementations_say_what_they_cannot():
    q, k, v = inputs((1, 128, 2, 1, 8))
    with pytest.raises(NotImplementedError, match="pass with_lse=False"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="not float32"):
        attention(q, k, v, with_lse=False, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="at least 128 tokens, not 100"):
        attention(q[:, :100], k[:, :100], v[:, :100], implementation="splash_tpu")
    wide = jnp.zeros((1, 128, 1, 512))
    with pytest.raises(NotImplementedError, match="up to 256, not 512"):
        attention(wide, wide, wide, implementation="splash_tpu")
    with pytest.raises(NotImplementedError, match="at least 640 tokens, not 128"):
        attention(q, k, v, FULL, implementation="splash_tpu")
    with pytest.raises(NotImplementedError, match="no window without causality"):
        attention(q, k, v, Mask(causal=False, window=3), implementation="splash_tpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("length", "true_length"), [(70, 41), (9, 3)])
def test_padding_does_not_touch_true_rows(length, true_length, implementation):
    q, k, v = inputs((1, length, 4, 2, 4), seed=5)
    run = compiled(implementation)
    clean, clean_lse = run(q, k, v)
    assert np.isfinite(clean).all()  # padding rows too
    assert np.isfinite(clean_lse).all()
    later = np.arange(length)[:, None, None] >= true_length
    out, lse = run(jnp.where(later, jnp.nan, q), jnp.where(later, jnp.nan, k), jnp.where(later, -1e30, v))
    np.testing.assert_array_equal(out[:, :true_length], clean[:, :true_length])
    np.testing.assert_array_equal(lse[:, :true_length], clean_lse[:, :true_length])


def test_a_row_of_a_batch_equals_the_row_alone():
    q, k, v = inputs((2, 70, 4, 2, 4), seed=6)
    out, lse = compiled("xla")(q, k, v)
    for row in range(2):
        alone, alone_lse = compiled("xla")(*(x[row : row + 1] for x in (q, k, v)))
        np.testing.assert_array_equal(out[row], alone[0])
        np.testing.assert_array_equal(lse[row], alone_lse[0])


@pytest.mark.parametrize("implementation", ["xla", "xla_wide"])
def test_no_square_matrix_for_all_heads(implementation):
    q, k, v = inputs((1, 64, 4, 2, 4))
    temporary = compiled(implementation).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    square = compiled("reference").lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert square > 4 * 64 * 64 * 4  # heads x length x length in float32
    assert temporary < square / 2


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 1, 8)), {}, "do not fit"),
        (((1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), {}, "do not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 4)), {}, "do not fit"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {}, "3 query heads are not a multiple of 2"),
        (((1, 4, 2, 8),) * 3, {"mask": Mask(segments=np.zeros((1, 5)))}, "segments .* must be .1, 4."),
        (((1, 4, 2, 8),) * 3, {"lengths": np.zeros(2)}, "lengths .* must be .1."),
        (((1, 4, 2, 8),) * 3, {"implementation": "cuda"}, "'cuda' is not one of"),
    ],
)
def test_errors(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(s) for s in shapes), **options)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (8, 4)])
def test_blocks_of_the_splash_mask_are_those_of_jax(height, width):
    ours, theirs = (mask((24, 24)) for mask in (splash_tpu._CausalMask, splash_tpu.splash.CausalMask))
    for top in range(0, 24, height):
        for left in range(0, 24, width):
            block = slice(top, top + height), slice(left, left + width)
            np.testing.assert_array_equal(ours[block], theirs[block])
    np.testing.assert_array_equal(ours[:, :], theirs[:, :])
