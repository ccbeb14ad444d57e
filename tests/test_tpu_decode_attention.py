"""The decode attention kernel compiled by the real TPU compiler: all named shapes and stores, no copy of a store."""

import re
import sys

import jax
import pytest
from tpu import compile_for, shape, temporaries

from vlcache_jax.kernels.decode_attention import Segments, Store, decode_attention, pallas_tpu, union_attention
from vlcache_jax.kernels.dispatch import implementations
from vlcache_jax.kernels.quantisation import group_size, scales_width
from vlcache_jax.kernels.shapes import SHAPES

TOPOLOGIES = ["v5e:2x2", *(pytest.param(chip, marks=pytest.mark.thorough) for chip in ("v5p:2x2x1", "v6e:2x2"))]
# One model for each head size; the others are thorough.
MODELS = list({shape.head_dim: name for name, shape in SHAPES.items()}.values())
MODELS += [pytest.param(name, marks=pytest.mark.thorough) for name in SHAPES if name not in MODELS]
BATCH, SLOTS = 4, 8192
BITS = {"int8": (8, 8), "int4": (4, 4), "int2": (2, 2), "int4/2": (4, 2)}  # of keys, of values
WORDS = {(8, 8): 8, (4, 4): 4, (2, 2): 2, (4, 2): "4/2"}


def arguments(heads, kv_heads, head_dim, store, queries=0, shared=False):
    """(positional, named) abstract arguments."""
    lead = (BATCH, queries) if queries else (BATCH,)
    lanes = (BATCH, kv_heads)
    segments = shape(BATCH, 1 if shared else kv_heads, dtype="int32")
    query = shape(*lead, heads, head_dim, dtype="float32" if store == "float32" else "bfloat16")
    if store not in BITS:
        keys = shape(*lanes, SLOTS, head_dim, dtype=store)
        return (query, keys, keys, segments, segments), {}
    keys, values = (shape(*lanes, SLOTS * bits // 8, head_dim, dtype="int8") for bits in BITS[store])
    scales = {
        "key_scales": shape(*lanes, SLOTS // group_size(BITS[store][0]), 2, scales_width(head_dim), dtype="int16"),
        "value_scales": shape(*lanes, 2, SLOTS, dtype="int16"),
    }
    return (query, keys, values, segments, segments), scales


def bits_of(keys, values):
    return WORDS[tuple(8 * x.shape[2] // SLOTS for x in (keys, values))] if keys.dtype == "int8" else None


def compiled(topology, calls):
    """A program of several calls: (positional, named) abstract arguments, and static options."""
    static = [options | {"bits": bits_of(*a[1:3])} for (a, _), options in calls]

    def run(arrays):
        return [decode_attention(*a, **n, **o) for (a, n), o in zip(arrays, static)]

    return compile_for(topology, run, [arrays for arrays, _ in calls])


def check(program, kernels):
    """As many kernels as wanted; stores are neither copied nor moved."""
    text = program.as_text()
    calls = re.findall(r'custom-call\(.*custom_call_target="tpu_custom_call"', text)
    assert len(calls) == kernels
    store_bytes = program.memory_analysis().argument_size_in_bytes
    # On v5p the compiler fetches some scales ahead; below, nothing as large as a store may be made at all.
    assert temporaries(program) <= max(0.02 * store_bytes, kernels * 2**18)
    for kind, sizes in re.findall(r"= (\w+)\[([\d,]+)\]\S* (?:copy|copy-start|fusion|transpose)\(", text):
        count = 1
        for size in sizes.split(","):
            count *= int(size)
        assert count < BATCH * SLOTS * 32, f"{kind}[{sizes}] is made: a store is copied"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float_stores(topology, name):
    """One program of several calls: both types; on the smallest chip a shared segment and a block of queries too."""
    calls = [(arguments(*SHAPES[name], store), {}) for store in ("float32", "bfloat16")]
    if topology == TOPOLOGIES[0]:
        calls.append((arguments(*SHAPES[name], "bfloat16", shared=True), {}))
        calls.append((arguments(*SHAPES[name], "bfloat16", queries=4), {"causal": True}))
    check(compiled(topology, calls), kernels=len(calls))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_quantised_stores(topology, name):
    """One program of several calls: all bits; on the smallest chip queries of a shared segment too."""
    calls = [(arguments(*SHAPES[name], store), {}) for store in BITS]
    if topology == TOPOLOGIES[0]:
        calls.append((arguments(*SHAPES[name], "int4", queries=4, shared=True), {}))
    check(compiled(topology, calls), kernels=len(calls))


@pytest.mark.parametrize("store", ["bfloat16", "int8"])
def test_the_kernel_says_what_it_costs(store):
    """Of a store that 32 layers share: a thirty-second of its slots, for every query head two products."""
    heads, kv_heads, size = SHAPES["llava-v1.6-mistral-7b"]
    (_, keys, values, *segments), scales = arguments(heads, kv_heads, size, store)

    def run(query, keys, values, segments, scales):
        held = Store(keys, values, **scales, bits=bits_of(keys, values), segments=32)
        return pallas_tpu.decode_attention(query, held, Segments(*segments), scale=1.0, causal=False)

    jaxpr = jax.make_jaxpr(run)(shape(BATCH, 1, heads, size), keys, values, segments, scales)
    (call,) = (x for x in jaxpr.eqns if x.primitive.name == "pallas_call")
    cost, slots = call.params["cost_estimate"], SLOTS // 32
    assert (cost.flops, cost.transcendentals) == (2 * 2 * BATCH * heads * slots * size, BATCH * heads * slots)
    slot = 2 * size * 2  # keys and values, or their codes, a group's scales of each channel, and two of each value
    if store == "int8":
        slot = 2 * size + 2 * size * 2 / group_size(8) + 2 * 2
    assert cost.bytes_accessed == BATCH * (kv_heads * slots * slot + heads * size * (2 + 4))


@pytest.mark.parametrize("queries", [8, 16])
def test_large_blocks_of_queries(queries):
    call = arguments(*SHAPES["llava-1.5-7b"], "bfloat16", queries=queries)
    check(compiled("v5e:2x2", [(call, {"causal": True})]), kernels=1)


def test_a_store_that_the_kernel_cannot_read_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SLOTS", 8192 + 16)
    call = arguments(*SHAPES["qwen2-0.5b"], "bfloat16")
    text = compiled("v5e:2x2", [(call, {}), (arguments(*SHAPES["llava-1.5-7b"], "bfloat16"), {})]).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    read, left = implementations(text)  # the program says which ran, and why not the better one
    reason = "pallas_tpu: 8208 slots are not a multiple of 128: copies of a TPU are whole tiles"
    assert (read, left) == ("decode_attention=pallas_tpu", f"decode_attention=xla <{reason}>")


@pytest.mark.parametrize("tokens", [0, 32], ids=["decoding", "a block"])
def test_a_shared_store_is_not_repeated(tokens):
    """8 questions to each of 4 contexts; a block of 8 * 32 queries is read in chunks."""
    heads, kv_heads, head_dim = SHAPES["llava-1.5-7b"]
    (_, keys, values, *segments), _ = arguments(heads, kv_heads, head_dim, "bfloat16", shared=True)
    parts = [(Store(keys, values), Segments(*segments))]
    query = shape(8 * BATCH, *((tokens,) if tokens else ()), heads, head_dim)
    program = compile_for("v5e:2x2", union_attention, query, parts)
    text = program.as_text()
    assert "tpu_custom_call" in text
    store_bytes = 2 * BATCH * kv_heads * SLOTS * head_dim * 2
    assert temporaries(program) < (0.1 if tokens else 0.01) * store_bytes
