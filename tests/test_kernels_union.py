"""Attention over several stores, of which some are shared by several query rows."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiers import later

import vlcache_jax as vlc
from vlcache_jax.kernels.decode_attention import Segments, Store, union, union_attention
from vlcache_jax.kernels.quantisation import quantise_keys, quantise_values
from vlcache_jax.parallel import ops

ROWS, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 6, 4, 2, 128, 256


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of this file's time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def part(rows, seed, kv_heads=1, quantised=False):
    """A store of `rows` rows, NaN outside its segments, and the segments."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, rows, KV_HEADS, SLOTS, HEAD_DIM)).astype(np.float32)
    offsets = 128 * rng.integers(0, 2, (rows, kv_heads)).astype(np.int32)
    lengths = rng.integers(1, 129, (rows, kv_heads)).astype(np.int32)
    lengths[0, 0] = 0
    segments = Segments(jnp.asarray(offsets), jnp.asarray(lengths))
    if quantised:
        codes, scales = zip(quantise_keys(jnp.asarray(keys), 8), quantise_values(jnp.asarray(values), 8))
        return Store(*codes, *scales, bits=8), segments
    slot = np.arange(SLOTS)
    inside = (slot >= offsets[..., None]) & (slot < (offsets + lengths)[..., None])
    return Store(*(jnp.asarray(np.where(inside[..., None], x, np.nan)) for x in (keys, values))), segments


def repeated(parts, rows):
    return jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[0], axis=0), parts)


PARTS = [part(2, 1), part(ROWS, 2, KV_HEADS), part(1, 3, KV_HEADS), part(2, 4, quantised=True), part(ROWS, 5)]


@pytest.mark.parametrize("n", [0, 5], ids=["one query", "a block"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", *later("reference")])
def test_a_shared_store_is_as_good_as_a_repeated_one(implementation, n):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(ROWS, *((n,) if n else ()), HEADS, HEAD_DIM)), jnp.float32)
    run = partial(union_attention, implementation=implementation, interpret=implementation == "pallas_tpu")
    with mock.patch.object(union, "_MOST_ROWS", 7 * HEADS):  # a block of 3 * 5 queries is read in chunks
        out, lse = jax.jit(run)(query, PARTS)
    blocks = query if n else query[:, None]
    parts = repeated(PARTS, ROWS)
    alone = jax.jit(partial(union_attention, implementation="reference"))
    separate = [alone(blocks[:, i], parts) for i in range(blocks.shape[1])]  # one query at a time
    wanted, wanted_lse = (jnp.stack(x, axis=1).reshape(y.shape) for x, y in zip(zip(*separate), (out, lse)))
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-5)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="a store of 4 rows cannot be shared by 6 query rows"):
        union_attention(jnp.zeros((ROWS, HEADS, HEAD_DIM)), [part(4, 0)])


@pytest.mark.parametrize("n", [0, 3], ids=["one query", "a block"])
def test_on_a_mesh(n):
    """Stores of 8 rows are split, that of 1 row is everywhere, and that of 2 rows is read whole."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(8, *((n,) if n else ()), HEADS, HEAD_DIM)), jnp.float32)
    parts = [part(8, 1, KV_HEADS), part(1, 2), part(2, 3)]
    run = partial(ops.union_attention, vlc.Kernels())
    wanted = jax.jit(run)(query, parts)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(query, parts).compile()
        found = compiled(query, parts)
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, atol=1e-5)
