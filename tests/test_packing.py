"""Every kept token lands in its segment, with its own key, value and position."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.cache.geometry import ALIGNMENT, align, capacity
from vlcache_jax.cache.packing import pack

LAYERS, BATCH, KV_HEADS, ENTRIES, HEAD_DIM = 3, 2, 2, 37, 4
TOTAL = 50  # slots of all layers
quick = settings(max_examples=20, deadline=None, derandomize=True)
packed = functools.partial(jax.jit, static_argnums=(5, 6))(pack)


def candidates(heads, position_heads, seed, slots, kv_heads=KV_HEADS):
    """Random keys, values, ascending positions, and an order of ascending indices that ends in `ENTRIES`."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, BATCH, kv_heads, ENTRIES, HEAD_DIM)
    keys, values = rng.normal(size=(2, *shape)).astype(np.float32)
    positions = np.sort(
        rng.permuted(np.tile(np.arange(90), (LAYERS, BATCH, position_heads, 1)), axis=-1)[..., :ENTRIES]
    )
    order = np.full((LAYERS, BATCH, heads, ENTRIES), ENTRIES)
    for l, b, h in np.ndindex(LAYERS, BATCH, heads):
        count = slots[l, b, h] if slots.ndim == 3 else slots[l, b]
        order[l, b, h, :count] = np.sort(rng.permutation(ENTRIES)[:count])
    return keys, values, positions.astype(np.int32), order.astype(np.int32)


@st.composite
def splits(draw):
    """i32 [layers, batch]: splits of up to TOTAL slots, from the even to the most lopsided."""
    slots = np.zeros((LAYERS, BATCH), np.int32)
    for b in range(BATCH):
        rest = TOTAL
        for l in draw(st.permutations(range(LAYERS))):
            most = min(ENTRIES, rest - 2)  # leave one for each other layer
            slots[l, b] = draw(
                st.sampled_from([n for n in (1, 15, 16, 17, 33, most) if n <= most]) | st.integers(1, most)
            )
            rest = max(rest - slots[l, b], 3)
    return slots


@pytest.mark.parametrize(("heads", "position_heads"), [(KV_HEADS, 1), (KV_HEADS, KV_HEADS), (1, 1)])
@quick
@given(slots=splits(), seed=st.integers(0, 10))
def test_every_kept_token(heads, position_heads, slots, seed):
    pool = capacity(TOTAL + 4, LAYERS)
    keys, values, positions, order = candidates(heads, position_heads, seed, slots)
    store = packed(keys, values, positions, order, slots, pool)
    assert store.keys.shape == store.values.shape == (BATCH, KV_HEADS, pool, HEAD_DIM)
    np.testing.assert_array_equal(store.lengths[..., 0], slots.T)
    taken = np.zeros((BATCH, pool), bool)
    for b in range(BATCH):
        end = 0
        for l in range(LAYERS):
            first, count = int(store.offsets[b, l, 0]), int(slots[l, b])
            assert first % ALIGNMENT == 0
            assert end <= first <= end + ALIGNMENT - 1
            end = first + count
            assert end <= pool
            taken[b, first:end] = True
            for h in range(KV_HEADS):
                chosen = order[l, b, h if heads > 1 else 0, :count]
                np.testing.assert_array_equal(store.keys[b, h, first:end], keys[l, b, h, chosen])
                np.testing.assert_array_equal(store.values[b, h, first:end], values[l, b, h, chosen])
                wanted = positions[l, b, h if position_heads > 1 else 0, chosen]
                np.testing.assert_array_equal(store.positions[b, h, first:end], wanted)
    free = np.broadcast_to(~taken[:, None], store.positions.shape)
    assert np.all(np.asarray(store.positions)[free] == -1)
    assert np.all(np.asarray(store.positions)[~free] >= 0)


@pytest.mark.parametrize(("lanes", "position_heads"), [(1, 1), (2, 4), (4, 4)])
@quick
@given(data=st.data(), seed=st.integers(0, 10))
def test_every_kept_token_of_heads_that_share_a_lane(lanes, position_heads, data, seed):
    heads, group = 4, 4 // lanes
    slots = np.array(data.draw(st.lists(st.integers(1, ENTRIES), min_size=24, max_size=24))).reshape(LAYERS, BATCH, 4)
    keys, values, positions, order = candidates(heads, position_heads, seed, slots, kv_heads=4)
    pool = capacity(LAYERS * group * ENTRIES, LAYERS * group)
    store = packed(keys, values, positions, order, slots.astype(np.int32), pool, lanes)
    assert store.keys.shape == (BATCH, lanes, pool, HEAD_DIM)
    np.testing.assert_array_equal(store.lengths, slots.transpose(1, 0, 2))
    free = np.ones((BATCH, lanes, pool), bool)
    end = np.zeros((BATCH, lanes), int)
    for b, l, h in np.ndindex(BATCH, LAYERS, heads):  # the order in which the segments of a lane follow one another
        lane, first, chosen = h // group, int(store.offsets[b, l, h]), order[l, b, h, : slots[l, b, h]]
        assert first == align(int(end[b, lane]))
        end[b, lane] = first + len(chosen)
        here = slice(first, first + len(chosen))
        np.testing.assert_array_equal(store.keys[b, lane, here], keys[l, b, h, chosen])
        np.testing.assert_array_equal(store.values[b, lane, here], values[l, b, h, chosen])
        wanted = positions[l, b, h if position_heads > 1 else 0, chosen]
        np.testing.assert_array_equal(store.positions[b, lane, here], wanted)
        free[b, lane, here] = False
    np.testing.assert_array_equal(np.asarray(store.positions) == -1, free)


@quick
@given(slots=st.lists(st.integers(1, 100), min_size=1, max_size=12))
def test_capacity_suffices_for_every_split(slots):
    assert sum(align(n) for n in slots) <= capacity(sum(slots), len(slots))


@pytest.mark.parametrize("layers", [1, 2, 32])
def test_capacity_of_the_worst_split(layers):
    # Segments of one slot more than a multiple of the alignment waste the most.
    total = layers * (ALIGNMENT + 1)
    assert capacity(total, layers) == layers * 2 * ALIGNMENT
    assert capacity(total, layers) % ALIGNMENT == 0


def test_free_slots_never_take_nan_from_nowhere():
    """What free slots hold comes from the candidates: finite keys stay finite."""
    slots = np.ones((LAYERS, BATCH), np.int32)
    store = packed(*candidates(KV_HEADS, 1, 0, slots), slots, capacity(TOTAL + 4, LAYERS))
    assert np.isfinite(store.keys).all()
    assert np.isfinite(store.values).all()


@pytest.mark.parametrize(("heads", "position_heads", "lanes"), [(4, 4, None), (1, 1, None), (4, 4, 1), (4, 1, 2)])
def test_packing_needs_little_more_than_the_pool(heads, position_heads, lanes):
    """The indices of the slots, but no copy of the candidates or of the pool."""
    layers, batch, kv_heads, entries, head_dim, pool = 4, 2, 4, 256, 64, 512
    keys = jax.ShapeDtypeStruct((layers, batch, kv_heads, entries, head_dim), np.float32)
    positions = jax.ShapeDtypeStruct((layers, batch, position_heads, entries), np.int32)
    order = jax.ShapeDtypeStruct((layers, batch, heads, entries), np.int32)
    slots = jax.ShapeDtypeStruct((layers, batch) if lanes is None else (layers, batch, kv_heads), np.int32)
    pool = pool if lanes is None else pool * kv_heads // lanes
    memory = packed.lower(keys, keys, positions, order, slots, pool, lanes).compile().memory_analysis()
    one_copy = min(keys.size, batch * (lanes or kv_heads) * pool * head_dim) * 4
    # XLA for CPUs copies what it gathers into a single lane, keys and values in turn; that for TPUs does not
    # (test_tpu_packing.py).
    assert memory.temp_size_in_bytes < (1.1 * one_copy if lanes == 1 else one_copy / 2)
