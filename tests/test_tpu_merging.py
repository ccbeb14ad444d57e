"""Compiled for a TPU, merging works in place and needs little beside the tokens of one layer of one row."""

import pytest
from tpu import compile_for, shape, temporaries

from vlcache_jax.cache.merging import BLOCK, merge_evicted


@pytest.mark.thorough
def test_merging_works_in_place():
    layers, batch, kv_heads, tokens, head_dim = 32, 8, 8, 8192, 128
    keys = shape(layers, batch, kv_heads, tokens, head_dim)
    order = shape(layers, batch, kv_heads, tokens, dtype="int32")
    lengths = shape(layers, batch, dtype="int32")
    run = lambda *x: merge_evicted(*x, "pivotal")  # noqa: E731
    program = compile_for("v5e:2x2", run, keys, keys, order, lengths, donate=(0, 1))
    assert program.memory_analysis().alias_size_in_bytes >= 2 * layers * batch * kv_heads * tokens * head_dim * 2
    assert temporaries(program) < kv_heads * tokens * (BLOCK + 3 * head_dim) * 4  # 128 MiB; a square would be 2 GiB
