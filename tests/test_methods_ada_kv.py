"""Ada-KV and what it brings: slots that differ between the KV heads of a layer, in lanes that heads share."""

import functools

import jax
import jax.numpy as jnp
import method_references as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from stub_model import KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cache.geometry import capacity
from vlcache_jax.cache.packing import pack
from vlcache_jax.explain.pictures import kept_by_layer
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.policies import AdaptiveHeads
from vlcache_jax.policies.shares import SlotBudget, slot_budget
from vlcache_jax.typing import ModelSpec

quick = settings(max_examples=40, deadline=None, derandomize=True)


@functools.cache
def shared_out(floor, lanes, slots):
    rule = AdaptiveHeads(floor=floor, recent=vlc.Tokens(3))
    budget = SlotBudget(2, per_layer=slots, lanes=lanes)

    def slots(scores, lengths):
        held = jnp.broadcast_to(lengths[:, None], scores.shape[:2])
        return rule.slots((scores, held, scores[:, :, 0, 0]), lengths, budget)

    return jax.jit(slots)


@pytest.mark.parametrize(("floor", "lanes", "slots"), [(0.2, 1, 9), (0.0, 2, 9), (0.37, 2, 5), (1.0, 1, 2)])
@quick
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_slots_of_heads_equal_the_definition(floor, lanes, slots, seed, ties):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, 3)
    scores = rng.random((3, 2, 4, 20)) ** rng.integers(1, 6, (1, 1, 4, 1))
    scores = np.floor(4 * scores) if ties else scores
    found = shared_out(floor, lanes, slots)(jnp.asarray(scores, jnp.float32), jnp.asarray(lengths))
    for row, layer in np.ndindex(3, 2):
        n, mean = lengths[row], min(slots, lengths[row])
        mine = scores[row, layer, :, :n].astype(np.float32)
        assert found[row, layer].tolist() == reference.adaptive_heads(mine, mean, 3, floor, lanes)
        per_lane = np.asarray(found[row, layer]).reshape(lanes, -1).sum(axis=1)
        assert per_lane.tolist() == [mean * 4 // lanes] * lanes, "each lane holds its share exactly"


def test_what_is_reported_and_drawn():
    policy = vlc.AdaKV(0.4, window=4)
    batch = stub_batch(seed=1)
    ctx = vlc.prefill(StubModel(), stub_params(batch, 1), batch, policy)
    report, (_, state) = ctx.report, ctx.start(4)
    kept = kept_sets(state)
    for layer in range(LAYERS):
        positions = np.asarray(state.kept_positions(layer))
        for row in range(batch.size):
            sizes = [len(head) for head in kept[layer][row]]
            assert report.kept[row, layer] == max(sizes)
            drawn = kept_by_layer(ctx, row)[layer]
            for head in range(KV_HEADS):
                for found in (positions[row, head], drawn[head]):
                    assert found[found >= 0].tolist() == kept[layer][row][head]
    slots = np.array([sum(len(h) for layer in kept for h in layer[row]) for row in range(batch.size)])
    np.testing.assert_allclose(report.kept_fraction, slots / (LAYERS * KV_HEADS * batch.lengths), rtol=1e-6)
    assert report.exact.all()


def context_bytes(policy, length, model):
    rows = np.zeros((2, length), np.int32)
    batch = Batch(rows, np.array([100, 100], np.int32), rows - 1, np.zeros((2, 0, 4, 4, 3), np.float32))
    params = {"query": 4, "key": 2, "value": 2}
    params = {name: jax.ShapeDtypeStruct((3, 2, length, heads, 8), np.float32) for name, heads in params.items()}
    return jax.eval_shape(lambda p: vlc.prefill(model, p, batch, policy).start(4)[1], params).context.nbytes


@pytest.mark.parametrize("length", [1024, 1536, 4096])
@pytest.mark.parametrize("lanes", [1, 2])
def test_memory_is_that_of_snap_kv(length, lanes):
    ada, snap = vlc.AdaKV(0.1, window=4, lanes=lanes), vlc.SnapKV(0.1, window=4)
    ratio = context_bytes(ada, length, StubModel()) / context_bytes(snap, length, StubModel())
    assert abs(ratio - 1) < 0.05


@pytest.mark.parametrize("pool", [64, 1000, 4096, 4200])
def test_bytes_are_what_the_shared_lanes_of_one_prompt_take(pool):
    spec = ModelSpec(num_layers=3, num_kv_heads=4, head_dim=16, max_positions=9, dtype=jnp.float32)
    slot = 2 * (2 * 16 * 4 + 4)  # of two lanes
    fixed = 2 * 4 * 3 * 4
    if pool == 64:
        with pytest.raises(vlc.PolicyError, match=f"give at least {fixed + slot * 96}"):
            slot_budget(vlc.Bytes(fixed + slot * pool), spec, 2)
        return
    count = slot_budget(vlc.Bytes(fixed + slot * pool), spec, 2).total(10**6)
    assert pool - 160 <= capacity(2 * count, 2 * 3) <= pool


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vlc.AdaKV(floor_alpha=1.5), r"floor_alpha=1.5 is out of range: give a fraction in \[0, 1\]"),
        (lambda: vlc.AdaKV(lanes=0), "lanes=0 is out of range"),
        (
            lambda: vlc.AdaKV(16, window=32),
            "ada_kv: sinks=0 and a window of 32 recent tokens do not fit into",
        ),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(vlc.PolicyError, match=message):
        build()


def test_lanes_that_do_not_divide_the_heads():
    batch = stub_batch()
    with pytest.raises(vlc.PolicyError, match="policy 'ada_kv': lanes=3 do not divide the model's 2 KV heads"):
        vlc.prefill(StubModel(), stub_params(batch), batch, vlc.AdaKV(window=4, lanes=3)).start(4)


def on_mesh(shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_shared_lanes_on_a_mesh(lanes):
    """Lanes are split over the axis of the heads where they divide over it; one lane lies on every device."""
    layers, rows, kv_heads, entries, size = 2, 2, 4, 9, 8
    rng = np.random.default_rng(lanes)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    keys, values = draw(layers, rows, kv_heads, entries, size), draw(layers, rows, kv_heads, entries, size)
    tail, query = draw(rows, kv_heads, 16, size), draw(rows, 2 * kv_heads, size)
    slots = rng.integers(1, entries + 1, (layers, rows, kv_heads))
    order = np.where(np.arange(entries) < slots[..., None], np.arange(entries), entries)
    positions = jnp.broadcast_to(jnp.arange(entries), (layers, rows, 1, entries))

    def run(keys, values, tail, query):
        group = kv_heads // lanes
        pool = capacity(group * layers * entries, group * layers)
        store = pack(keys, values, positions, jnp.asarray(order), jnp.asarray(slots), pool, lanes)
        new = Store(tail, tail), Segments(jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), 3))
        return store, ops.union_attention(ops.Kernels(), query, [store.layer(1), new])

    plain, wanted = jax.jit(run)(keys, values, tail, query)
    with jax.set_mesh(on_mesh((2, 4))):
        store, found = jax.jit(run)(keys, values, tail, query)
    split = NamedSharding(on_mesh((2, 4)), PartitionSpec("data", "model" if lanes == 4 else None))
    assert store.keys.sharding.is_equivalent_to(split, 4)
    jax.tree.map(np.testing.assert_array_equal, store, plain)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)
    for row, head in np.ndindex(rows, kv_heads):  # and it is the attention of what the head kept
        count = slots[1, row, head]
        k, v = (np.concatenate([x[1, row, head, :count], tail[row, head, :3]]) for x in (keys, values))
        weights = reference.softmax(np.asarray(query[row, 2 * head : 2 * head + 2]) @ k.T / np.sqrt(size))
        np.testing.assert_allclose(found[0][row, 2 * head : 2 * head + 2], weights @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PlacementWarning")  # one lane, which no axis splits
def test_mesh_gives_the_same_tokens():
    model, params = tiny_llava()
    policy, batch, mesh = vlc.AdaKV(0.3, window=4), ragged_batch(rows=4), on_mesh((4, 2))
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    rows = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), batch)

    def run(params, batch):
        logits, state = vlc.prefill(model, params, batch, policy).start(8)
        return vlc.decode(model, params, logits, state, 8, eos_token_ids=[]), state

    (out, state), (plain, alone) = run(placed, rows), run(params, batch)
    assert state.context.keys.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 4)
    assert state.tail.keys.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "model")), 4)
    np.testing.assert_array_equal(state.context.lengths, alone.context.lengths)
    np.testing.assert_array_equal(out[0], plain[0])
