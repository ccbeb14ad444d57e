"""Compiled for a TPU, packing makes nothing of the size of the candidates or the pool but the pool itself."""

import pytest
from tpu import compile_for, shape, temporaries

from vlcache_jax.cache.geometry import capacity, segment_alignment
from vlcache_jax.cache.packing import pack


@pytest.mark.parametrize(
    ("heads", "position_heads", "lanes", "bits"),
    [
        (8, 8, 1, None),
        *(
            pytest.param(*x, marks=pytest.mark.thorough)
            for x in ((8, 8, None, None), (1, 1, None, None), (8, 1, None, 4))
        ),
    ],
)
def test_packing_makes_no_copies(heads, position_heads, lanes, bits):
    layers, batch, kv_heads, entries, head_dim = 32, 8, 8, 2048, 128
    group = kv_heads // (lanes or kv_heads)
    pool = capacity(group * layers * 8192 // 10, group * layers, segment_alignment(bits))
    keys = shape(layers, batch, kv_heads, entries, head_dim)
    positions = shape(layers, batch, position_heads, entries, dtype="int32")
    order = shape(layers, batch, heads, entries, dtype="int32")
    slots = shape(layers, batch, *([] if lanes is None else [kv_heads]), dtype="int32")
    channels = shape(layers, batch, kv_heads, head_dim, dtype="float32")
    arguments = [keys, keys, positions, order, slots, *([channels] if bits else [])]
    program = compile_for("v5e:2x2", lambda *x: pack(*x[:5], pool, lanes, bits, *x[5:]), *arguments)
    written = 2 * batch * (lanes or kv_heads) * pool * head_dim * (16 if bits is None else bits) // 8
    # Index tables; those of shared lanes and quantised stores, which hold less, are 5 % (libtpu 0.0.50).
    assert temporaries(program) < written / (50 if lanes is None and bits is None else 15)
