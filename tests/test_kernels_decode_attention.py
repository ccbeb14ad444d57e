"""Decode attention: every implementation against the formula in float64, and no slot read outside the segments."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import Case, expected, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from tiers import later

from vlcache_jax.kernels.decode_attention import decode_attention, pallas_tpu, xla
from vlcache_jax.kernels.merge import merge
from vlcache_jax.kernels.shapes import SHAPES

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu"]
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile

CASES = {
    "per head": Case(2, 4, 2, 2, 288, 128),
    "shared": Case(3, 4, 1, 2, 288, 128),
    "two KV heads in a lane": Case(2, 6, 2, 1, 288, 128),
    "slots last": Case(3, 4, 2, 2, 384, 8),
    "slots last, shared": Case(2, 4, 1, 4, 384, 8),
    "queries": Case(2, 4, 2, 2, 288, 128, queries=3),
    "causal": Case(2, 4, 2, 2, 288, 128, queries=3, causal=True),
    "causal, slots last, shared": Case(2, 6, 1, 2, 384, 8, queries=5, causal=True),
    "int8": Case(2, 4, 2, 2, 384, 128, store="int8"),
    "int4, causal": Case(2, 4, 1, 2, 384, 128, queries=2, causal=True, store="int4"),
    "int2": Case(2, 4, 2, 2, 384, 128, queries=2, store="int2"),
    "int8, slots last": Case(2, 4, 2, 2, 384, 8, store="int8"),
    "int4, slots last, shared, causal": Case(2, 4, 1, 2, 512, 8, queries=2, causal=True, store="int4"),
    "int2, slots last": Case(2, 6, 2, 2, 1024, 8, store="int2"),
    "int4/2, causal": Case(2, 4, 1, 2, 384, 128, queries=2, causal=True, store="int4/2"),
    "int4/2, slots last": Case(2, 6, 2, 2, 1024, 8, store="int4/2"),
}
# What only the plain implementations serve: small and odd stores.
PLAIN = {
    "per head": Case(2, 4, 2, 2, 40, 4),
    "shared": Case(3, 4, 1, 2, 40, 4),
    "two KV heads in a lane": Case(2, 6, 2, 1, 72, 4),
    "causal": Case(2, 4, 4, 2, 40, 8, queries=4, causal=True),
    "a store smaller than a block": Case(2, 2, 2, 2, 9, 4),
}


@functools.cache
def compiled(implementation, case, scale=None, interpret=True):
    """The op, with blocks so small that the segments have several."""

    def run(arguments, named):
        options = {"interpret": interpret} if implementation == "pallas_tpu" else {}
        with mock.patch.object(pallas_tpu, "_MAX_BLOCK", 128):
            return decode_attention(
                *arguments,
                **named,
                **options,
                scale=scale,
                bits=case.bits,
                causal=case.causal,
                implementation=implementation,
            )

    return jax.jit(run, compiler_options=FAST)


def check(case, actual, wanted, atol=1e-5, most=None):
    """All within `atol`; 99 % within `most`."""
    (out, lse), (wanted_out, wanted_lse) = actual, wanted
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=2e-5)  # logits accumulate in float32, whatever the store
    np.testing.assert_allclose(out, wanted_out, rtol=0, atol=atol)
    if most is not None:
        assert np.mean(np.abs(np.asarray(out) - wanted_out) <= most) >= 0.99


@st.composite
def segments(draw, case, alignment=None):
    """Offsets and lengths: anything, with a liking for empty segments, tile and block edges and the store's end."""
    alignment = case.alignment if alignment is None else alignment
    offsets, lengths = np.zeros((2, case.batch, case.segments), np.int32)
    for index in np.ndindex(lengths.shape):
        edges = [n for n in (0, 1, 15, 16, 17, 127, 128, 129, 256, case.slots) if n <= case.slots]
        lengths[index] = draw(st.sampled_from(edges) | st.integers(0, case.slots))
        last = (case.slots - int(lengths[index])) // alignment
        offsets[index] = draw(st.sampled_from([0, last]) | st.integers(0, last)) * alignment
    return offsets, lengths


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_formula(implementation, name, data):
    """Slots outside the segments hold NaN. Segments start where stores put them, or, as a window moves on, anywhere."""
    case = CASES[name]
    found = data.draw(segments(case, alignment=data.draw(st.sampled_from([case.alignment, 1]))))
    arguments, named = case.arguments(*found, seed=data.draw(st.integers(0, 3)))
    check(case, compiled(implementation, case)(arguments, named), expected(case, arguments, named))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_formula_of_small_stores(implementation, name, data):
    case = PLAIN[name]
    arguments, named = case.arguments(*data.draw(segments(case, alignment=1)))
    check(case, compiled(implementation, case)(arguments, named), expected(case, arguments, named))


@pytest.mark.parametrize("store", ["float32", "int8"])
@pytest.mark.parametrize("implementation", ["xla", "xla_wide"])
def test_segments_of_many_blocks(implementation, store):
    case = Case(2, 4, 2, 2, 4096, 8, store=store)
    offsets, lengths = np.array([[0, 32], [1024, 512]], np.int32), np.array([[1111, 3333], [0, 1024]], np.int32)
    arguments, named = case.arguments(offsets, lengths)
    check(case, compiled(implementation, case)(arguments, named), expected(case, arguments, named))


@pytest.mark.parametrize("name", [*list(SHAPES)[:2], *later(*list(SHAPES)[2:])])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_named_shapes_in_bfloat16(implementation, name):
    heads, kv_heads, head_dim = SHAPES[name]
    case = Case(2 if kv_heads < 32 else 1, heads, kv_heads, kv_heads, 384, head_dim, store="bfloat16")
    arguments, named = case.arguments(*ragged(case))
    check(case, compiled(implementation, case)(arguments, named), expected(case, arguments, named), 1.5e-2, most=2e-3)


@pytest.mark.parametrize(
    "name", ["shared", "slots last", "causal", "int8", "int4, causal", "int4, slots last, shared, causal"]
)
def test_no_races_no_uninitialised_memory_no_reads_out_of_bounds(name):
    case = CASES[name]
    arguments, named = case.arguments(*ragged(case))
    actual = compiled("pallas_tpu", case, interpret=RACES)(arguments, named)
    check(case, actual, expected(case, arguments, named))


def test_a_bfloat16_store_without_races():
    case = Case(2, 4, 2, 2, 288, 128, store="bfloat16")
    arguments, named = case.arguments(*ragged(case))
    actual = compiled("pallas_tpu", case, interpret=RACES)(arguments, named)
    check(case, actual, expected(case, arguments, named), 1.5e-2, most=2e-3)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("name", ["per head", "int4, causal"])
def test_what_lies_outside_the_segments_changes_no_bit(implementation, name):
    case = CASES[name]
    run = compiled(implementation, case)
    clean, again, dirty = (run(*case.arguments(*ragged(case), outside=x)) for x in (0, 0, np.nan))
    for a, b, c in zip(clean, again, dirty):
        np.testing.assert_array_equal(a, b)  # the same twice
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("name", ["shared", "slots last"])
def test_a_row_of_a_batch_equals_the_row_alone(implementation, name):
    case = CASES[name]
    run = compiled(implementation, case)
    arguments, _ = case.arguments(*ragged(case))
    together = run(arguments, {})
    for row in range(case.batch):
        for actual, wanted in zip(together, run(tuple(x[row : row + 1] for x in arguments), {})):
            np.testing.assert_array_equal(actual[row], wanted[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_and_large_logits(implementation):
    case = CASES["per head"]
    (q, k, v, offsets, lengths), _ = case.arguments(*ragged(case))
    arguments = (q * 1e2, k * 1e2, v, offsets, lengths)
    out, lse = compiled(implementation, case, scale=0.7)(arguments, {})
    wanted, wanted_lse = expected(case, arguments, {}, scale=0.7)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=3e-2)  # logits of 1e5: a float32 step is 1e-2
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


def test_merging_the_parts_of_a_segment_gives_the_whole():
    case = CASES["per head"]
    offsets, lengths = np.zeros((2, 2), np.int32), np.array([[288, 100], [48, 0]], np.int32)
    (q, k, v, *_), _ = case.arguments(offsets, lengths)
    run = compiled("pallas_tpu", case)
    whole = run((q, k, v, offsets, lengths), {})
    first = np.minimum(lengths, 48)
    parts = [run((q, k, v, offsets, first), {}), run((q, k, v, offsets + 48, lengths - first), {})]
    for actual, wanted in zip(merge(parts), whole):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_in_a_loop(implementation):
    """The op's offsets may be loop variables; None leaves the choice to the platform."""
    case = CASES["per head"]
    arguments, _ = case.arguments(*ragged(case))
    q, k, v, offsets, lengths = arguments

    def run(q, k, v, offsets, lengths):
        def body(state):
            i, total = state
            out, _ = decode_attention(q, k, v, offsets, jnp.maximum(lengths - i, 0), implementation=implementation)
            return i + 1, total + out

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.zeros(q.shape)))

    _, total = jax.jit(run)(*arguments)
    wanted = sum(expected(case, (q, k, v, offsets, np.maximum(np.asarray(lengths) - i, 0)), {})[0] for i in range(3))
    np.testing.assert_allclose(total, wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("lengths", "steps"), [((0, 0), 0), ((0, 1), 1), ((128, 1), 1), ((129, 0), 2), ((400, 3), 4)])
def test_work_follows_the_longest_segment(lengths, steps):
    loops = []
    loop = jax.lax.fori_loop

    def recorder(lower, upper, body, init):
        loops.append(int(upper) - int(lower))
        return loop(lower, upper, body, init)

    case = Case(2, 2, 1, 1, 16384, 4)
    arguments, _ = case.arguments(np.zeros((2, 1), np.int32), np.array(lengths, np.int32)[:, None])
    with mock.patch.object(jax.lax, "fori_loop", recorder):
        decode_attention(*arguments, implementation="xla")
    assert xla.block_size(16384, xla.LARGEST) == 128
    assert loops == [steps - 1]  # the first block is read before the loop


@pytest.mark.parametrize(("implementation", "block"), [("xla", 128), ("xla_wide", 512)])
@pytest.mark.parametrize("name", ["per head", "causal", "int8"])
def test_a_step_touches_one_block_of_the_store(name, implementation, block):
    case = CASES[name]
    case = Case(**{**vars(case), "slots": 8192})
    arguments, named = case.arguments(*ragged(case))
    jaxpr = jax.make_jaxpr(
        lambda a, n: decode_attention(*a, **n, bits=case.bits, causal=case.causal, implementation=implementation)
    )(arguments, named)
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "while"]
    made = [out.aval.shape for e in loop.params["body_jaxpr"].jaxpr.eqns for out in e.outvars]
    assert any(block in shape for shape in made)
    assert not any(max(shape, default=0) >= 8192 // 4 for shape in made)


GPU = {
    "per head": Case(2, 4, 2, 2, 352, 64, store="bfloat16"),
    "shared, causal": Case(2, 4, 1, 2, 320, 128, queries=3, causal=True, store="bfloat16"),
    "two KV heads in a lane": Case(1, 6, 2, 1, 1024, 64, store="bfloat16"),  # in several parts
}


@pytest.mark.parametrize("name", [n for n, shape in SHAPES.items() if shape.head_dim % 64 == 0])
def test_gpu_kernel_lowers_without_a_gpu(name):
    """It is compiled only where there is one."""
    heads, kv_heads, head_dim = SHAPES[name]
    case = Case(2, heads, kv_heads, kv_heads, 4096, head_dim, queries=2, causal=True, store="bfloat16")
    arguments = jax.eval_shape(lambda: tuple(jnp.zeros(s, d) for s, d in gpu_shapes(case)))
    traced = jax.jit(lambda *a: decode_attention(*a, causal=True, implementation="pallas_gpu")).trace(*arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def gpu_shapes(case):
    """Shapes and dtypes of the arguments."""
    store = (case.batch, case.lanes, case.slots, case.head_dim)
    query = (case.batch, case.queries, case.heads, case.head_dim)
    segments = (case.batch, case.segments)
    return [(x, jnp.bfloat16) for x in (query, store, store)] + [(segments, jnp.int32)] * 2


# JAX 0.10 cannot interpret Mosaic GPU; 0.12 can, but for wgmma, which a plain product stands in for.
if hasattr(plgpu, "InterpretGPUParams"):

    @pytest.mark.parametrize("name", GPU)
    def test_gpu_kernel_interpreted(name):
        case = GPU[name]
        arguments, _ = case.arguments(*ragged(case))
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        actual = decode_attention(*arguments, causal=case.causal, implementation="pallas_gpu", interpret=interpret)
        check(case, actual, expected(case, arguments, {}), 1.5e-2, most=2e-3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 8, 4), (1, 1), (1, 1)), "do not fit"),
        (((1, 2, 4), (2, 1, 9, 4), (2, 1, 9, 4), (1, 1), (1, 1)), "do not fit"),
        (((2, 4), (2, 1, 9, 4), (2, 1, 9, 4), (1, 1), (1, 1)), "want .batch, heads, head_dim"),
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 9, 4), (1, 1), (1, 2)), "want two of"),
        (((1, 2, 4), (1, 1, 9, 4), (1, 1, 9, 4), (1,), (1,)), "want two of"),
        (((2, 2, 4), (2, 1, 9, 4), (2, 1, 9, 4), (1, 1), (2, 1)), "want two of"),
        (((1, 3, 4), (1, 2, 9, 4), (1, 2, 9, 4), (1, 1), (1, 1)), "do not divide"),
        (((1, 4, 4), (1, 4, 9, 4), (1, 4, 9, 4), (1, 2), (1, 2)), "do not divide"),
    ],
)
def test_errors(shapes, message):
    *store, offsets, lengths = shapes
    arguments = [jnp.zeros(s) for s in store] + [jnp.zeros(s, jnp.int32) for s in (offsets, lengths)]
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments)


def test_errors_of_scales():
    case = CASES["int4, causal"]
    arguments, named = case.arguments(*ragged(case))
    for missing in ("key_scales", "value_scales"):
        with pytest.raises(ValueError, match="a store of int8 wants both scales"):
            decode_attention(*arguments, **{k: v for k, v in named.items() if k != missing}, bits=4)
        with pytest.raises(ValueError, match=f"{missing} .* do not fit"):
            decode_attention(*arguments, **{k: v[..., :-1] if k == missing else v for k, v in named.items()}, bits=4)
    plain, _ = CASES["per head"].arguments(*ragged(CASES["per head"]))
    with pytest.raises(ValueError, match="a store of float32 wants no scales"):
        decode_attention(*plain, **named)


def test_implementations_that_cannot_serve_say_why():
    case = Case(1, 2, 1, 1, 40, 128)
    with pytest.raises(NotImplementedError, match="40 slots are not a multiple of 16"):
        decode_attention(*case.arguments(*ragged(case))[0], implementation="pallas_tpu")
    case = Case(1, 2, 1, 1, 128, 64, store="int4")
    arguments, named = case.arguments(*ragged(case))
    with pytest.raises(NotImplementedError, match="128 slots are not a multiple of 256"):
        decode_attention(*arguments, **named, bits=4, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="only bfloat16"):
        decode_attention(*arguments, **named, bits=4, implementation="pallas_gpu")
    for case, message in [
        (Case(1, 2, 1, 1, 128, 80, store="bfloat16"), "head size 80"),
        (Case(1, 16, 1, 1, 128, 64, queries=5, store="bfloat16"), "80 queries of a KV head"),
        (Case(1, 2, 1, 1, 48, 64, store="bfloat16"), "48 slots: at least 64"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(*case.arguments(*ragged(case))[0], implementation="pallas_gpu")


def test_unknown_implementation():
    case = PLAIN["per head"]
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        decode_attention(*case.arguments(*ragged(case))[0], implementation="cuda")
