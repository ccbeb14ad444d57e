"""Stores of 8, 4 or 2 bits: what is kept, where it lies, how far it is from what was computed, and what it costs."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stub_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_methods_promises import row_alone
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.demo.data.samples import FULL_GRID, HELD_OUT_SEED, make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.inference.decode_step import advance
from vlcache_jax.kernels.quantisation import dequantise_values, quantise_values
from vlcache_jax.kernels.rotation import rotated
from vlcache_jax.parallel.ops import union_attention
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.policies import METHODS, EnoughMass, Uniform

NAN = jax.lax.bitcast_convert_type(jnp.bfloat16(jnp.nan), jnp.int16)  # as scales are stored
CASES = {
    "look_m_candidates_4": vlc.LookM(0.35, merge=None, candidate_fraction=0.5, bits=4),
    "full_8": vlc.FullCache(bits=8),
    "full_2": vlc.FullCache(bits=2),
    "vl_cache_8_others_2": dataclasses.replace(vlc.VLCache(0.4, bits=8), evicted=vlc.Quantise(2)),
    "vl_cache_4_others_4_2": dataclasses.replace(vlc.VLCache(0.4, bits=4), evicted=vlc.Quantise("4/2")),
    "tova_others_4": dataclasses.replace(vlc.TOVA(0.4), evicted=vlc.Quantise(4)),
}
cases = pytest.mark.parametrize("policy", CASES.values(), ids=CASES, scope="module")


def prefill(policy, batch, params):
    return vlc.prefill(StubModel(), params, batch, policy).start(4)[1]


# What a store holds, in numpy

_ANGLES = 2 * np.pi * np.outer(np.arange(HEAD_DIM), np.arange(HEAD_DIM)) / HEAD_DIM
ROTATION = (np.cos(_ANGLES) + np.sin(_ANGLES)) / np.sqrt(HEAD_DIM)  # of what is stored; its own inverse


def codes_of(packed, bits):
    """Signed codes [..., slots, d]: token t of a group lies in byte row t % 32, part t // 32."""
    packed = np.asarray(packed).view(np.uint8)
    *lead, rows, d = packed.shape
    parts = packed.reshape(*lead, rows // 32, 1, 32, d) >> (bits * np.arange(8 // bits, dtype=np.uint8)[:, None, None])
    parts = (parts & (2**bits - 1)).astype(int)
    return np.where(parts >= 2 ** (bits - 1), parts - 2**bits, parts).reshape(*lead, -1, d)


def widths(bits):
    """Of the codes of keys and of values, which have no more."""
    return (bits, bits) if isinstance(bits, int) else tuple(map(int, bits.split("/")))


def held(store, layer, row, lane):
    """(positions, keys, values, step of each) of a segment, all float64; steps are those of rotated numbers."""
    store = jax.tree.map(np.asarray, store)
    head = min(lane, store.offsets.shape[2] - 1)
    start, count = store.offsets[row, layer, head], store.lengths[row, layer, head]
    cut = np.s_[start : start + count]
    positions, keys, values = (x[row, lane] for x in (store.positions, store.keys, store.values))
    if store.bits is None:
        return positions[cut], keys[cut].astype(float), values[cut].astype(float), 0, 0
    key_bits, value_bits = widths(store.bits)
    group = 256 // key_bits
    assert start % (256 // value_bits) == 0
    key_scales, value_scales = (x[row, lane].view(jnp.bfloat16) for x in (store.key_scales, store.value_scales))
    step, zero = np.repeat(key_scales[..., :HEAD_DIM], group, axis=0).astype(float).transpose(1, 0, 2)
    keys = codes_of(keys, key_bits) * step + zero
    value_step, value_zero = value_scales.astype(float)[..., None]
    values = codes_of(values, value_bits) * value_step + value_zero
    return positions[cut], keys[cut] @ ROTATION, values[cut] @ ROTATION, step[cut], value_step[cut]


@cases
def test_every_token_is_within_half_a_step_of_what_was_computed(policy):
    batch = stub_batch()
    params = stub_params(batch)
    state = prefill(policy, batch, params)
    plain = prefill(dataclasses.replace(policy, bits=None, evicted=vlc.Drop()), batch, params)
    np.testing.assert_array_equal(state.allocation.requested, plain.allocation.requested)
    kept = kept_sets(plain)
    others = isinstance(policy.evicted, vlc.Quantise)
    assert [store.bits for store in state.stores] == [policy.bits, *([policy.evicted.bits] if others else [])]
    for row, layer, lane in np.ndindex(batch.size, LAYERS, KV_HEADS):
        wanted = kept[layer][row][lane]
        both = [wanted, sorted(set(range(batch.lengths[row])) - set(wanted))]
        for store, expected in zip(state.stores, both):
            positions, keys, values, key_step, value_step = held(store, layer, row, lane)
            assert positions.tolist() == expected
            key, value = (params[name][layer, row, expected, lane].astype(float) for name in ("key", "value"))
            turn = np.eye(HEAD_DIM) if store.bits is None else ROTATION
            assert np.all(np.abs((keys - key) @ turn) <= 0.5 * key_step + 1e-5)
            assert np.all(np.abs((values - value) @ turn) <= 0.5 * value_step + 1e-5)
    for store in state.stores:  # nothing else claims to be a token
        of_segments = np.asarray(store.lengths).sum(axis=(1, 2))
        assert np.all(np.sum(np.asarray(store.positions) >= 0, axis=2) == of_segments[:, None])


@cases
def test_attention_over_what_is_held(policy):
    batch = stub_batch()
    state = prefill(policy, batch, stub_params(batch))
    query = np.random.default_rng(0).normal(size=(batch.size, HEADS, HEAD_DIM)).astype(np.float32)
    clean, dirty = state.stores, [poisoned(store) for store in state.stores]
    for layer in range(LAYERS):
        out, lse = union_attention(vlc.Kernels(), query, [store.layer(layer) for store in clean])
        again = union_attention(vlc.Kernels(), query, [store.layer(layer) for store in dirty])
        np.testing.assert_array_equal(out, again[0])
        np.testing.assert_array_equal(lse, again[1])
        for row, head in np.ndindex(batch.size, HEADS):
            parts = [held(store, layer, row, head // (HEADS // KV_HEADS)) for store in clean]
            keys, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
            logits = keys @ query[row, head] / np.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(out[row, head], weights @ values / weights.sum(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(lse[row, head], logits.max() + np.log(weights.sum()), rtol=1e-5, atol=1e-5)


def poisoned(store):
    """All that belongs to free slots alone, as bad as it can be."""
    free = store.positions < 0
    if store.bits is None:
        bad = {name: jnp.where(free[..., None], jnp.nan, getattr(store, name)) for name in ("keys", "values")}
        return dataclasses.replace(store, **bad)
    bits = widths(store.bits)
    group = 256 // bits[1]
    unused = jnp.all(free.reshape(*free.shape[:2], -1, group), axis=3)
    key_rows, value_rows = (jnp.repeat(unused, group * x // 8, axis=2)[..., None] for x in bits)
    groups = jnp.repeat(unused, group * bits[0] // 256, axis=2)[..., None, None]
    return dataclasses.replace(
        store,
        keys=jnp.where(key_rows, 77, store.keys),
        values=jnp.where(value_rows, 77, store.values),
        key_scales=jnp.where(groups, NAN, store.key_scales),
        value_scales=jnp.where(free[:, :, None], NAN, store.value_scales),
    )


@pytest.mark.bits
@pytest.mark.parametrize("name", ["full_2", "vl_cache_8_others_2"])
def test_a_row_holds_what_it_holds_alone_and_padding_widens_no_step(name):
    batch, policy = stub_batch(), CASES[name]
    params = stub_params(batch)
    together = prefill(policy, batch, params)
    for row in range(batch.size):
        alone = prefill(policy, *row_alone(batch, params, row, batch.length + 13))  # padded with NaN
        for one, other in zip(alone.stores, together.stores, strict=True):
            for layer, lane in np.ndindex(LAYERS, KV_HEADS):
                jax.tree.map(np.testing.assert_array_equal, held(one, layer, 0, lane), held(other, layer, row, lane))


# What it costs


def pool_bytes(slots, bits):
    """Of one KV head: codes, steps and zeros of each group and channel (of 128) of keys and each value, positions."""
    key_bits, value_bits = widths(bits)
    codes = slots * (key_bits + value_bits) // 8 * HEAD_DIM
    return codes + slots // (256 // key_bits) * 2 * 128 * 2 + slots * 2 * 2 + slots * 4


@cases
def test_bytes_are_those_of_the_buffers(policy):
    batch = stub_batch()
    state = jax.eval_shape(lambda p: vlc.prefill(StubModel(), p, batch, policy).start(4)[1], stub_params(batch))
    for store in state.stores:
        if store.bits is None:
            continue
        slots, group = store.positions.shape[2], 256 // widths(store.bits)[1]
        assert slots % group == 0
        per_row = KV_HEADS * pool_bytes(slots, store.bits) + 2 * 4 * LAYERS
        assert store.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(store)) == batch.size * per_row
        if store is not state.context and policy.allocate.even:  # as many as are left of the longest prompt
            left = LAYERS * batch.length - int(LAYERS * batch.length * policy.budget)
            assert slots == min(
                LAYERS * -(-batch.length // group) * group, -(-(left + LAYERS * (group - 1)) // group) * group
            )
        elif store is not state.context or policy.keeps_all:
            assert slots == LAYERS * -(-batch.length // group) * group
        else:
            kept = int(LAYERS * batch.length * policy.budget)
            assert kept + LAYERS * (group - 1) <= slots < kept + LAYERS * (group - 1) + group


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_budget_in_bytes_is_what_a_prompt_takes(bits):
    batch, group = stub_batch(length=150), 256 // bits
    fixed = 2 * 4 * LAYERS
    for groups in (3, 4):
        count = groups * KV_HEADS * pool_bytes(group, bits) + fixed
        policy = vlc.VLCache(vlc.Bytes(count + 7), bits=bits)
        state = jax.eval_shape(
            lambda p, policy=policy: vlc.prefill(StubModel(), p, batch, policy).start(4)[1], stub_params(batch)
        )
        assert state.context.nbytes == count * batch.size
    least = count - KV_HEADS * pool_bytes(group, bits)
    with pytest.raises(vlc.PolicyError, match=f"cannot hold one token for each of the 3 layers: give at least {least}"):
        prefill(vlc.VLCache(vlc.Bytes(least - 1), bits=bits), batch, stub_params(batch))


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(
    ("share", "tiers", "fraction"), [(0.5, (4,), 0.8), (0.6, (4, "4/2"), 0.6), (0.8, (8, 4), 0.35)]
)
def test_a_share_of_the_bytes_is_spent_on_bits_by_rank(share, tiers, fraction, repeat):
    """The tokens that VL-Cache's or KVzip's ranking puts first get more bits; all together take what was allowed."""
    batch = stub_batch(length=150)
    params = stub_params(batch)
    state = prefill(vlc.RankedBits(share, repeat=repeat), batch, params)
    assert tuple(store.bits for store in state.stores) == tiers
    each = [pool_bytes(128, bits) / 128 - 4 for bits in tiers]  # of a token; positions are not counted
    counts = [np.asarray(store.lengths).mean(axis=2).sum(axis=1) for store in state.stores]  # of a KV head
    taken = sum(count * size for count, size in zip(counts, each, strict=True))
    allowed = share * LAYERS * batch.lengths * 4 * HEAD_DIM
    assert np.all((allowed - max(each) - 0.01 * allowed <= taken) & (taken <= allowed + 1e-6))
    if len(tiers) > 1:
        np.testing.assert_array_equal(sum(counts), LAYERS * batch.lengths)
    plain = vlc.KVzip(fraction) if repeat else dataclasses.replace(vlc.VLCache(fraction), allocate=Uniform())
    assert str(kept_sets(state)) == str(kept_sets(prefill(plain, batch, params)))


def test_a_rotation_keeps_outliers_from_widening_the_steps_of_all():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 256, 64)).astype(np.float32)
    for outlier, gain in ((1, 0.95), (30, 2)):
        values[..., 0] *= outlier
        for bits in (8, 4, 2):

            def error(x, bits=bits):
                return float(jnp.sqrt(jnp.mean((dequantise_values(*quantise_values(x, bits), bits) - x) ** 2)))

            assert error(jnp.asarray(values)) >= gain * error(rotated(jnp.asarray(values)))


# As part of a model

MIXED = dataclasses.replace(vlc.VLCache(0.3, bits=8), evicted=vlc.Quantise(2))
NEW = 6


@pytest.mark.thorough
def test_answers_in_a_batch_in_one_program_and_on_a_mesh():
    model, params = tiny_llava()
    batch = ragged_batch(rows=8)
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return vlc.generate(model, params, batch, MIXED, NEW, eos_token_ids=[])

    out = run(params, batch)
    others = run(params, ragged_batch(rows=8, seed=1))
    assert len(traces) == 1
    assert not np.array_equal(out.report.kept, others.report.kept)

    state = jax.eval_shape(lambda p: vlc.prefill(model, p, batch, MIXED).start(NEW)[1], params)
    assert out.report.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.stores))
    total = [max(3, int(3 * n) * 3 // 10) for n in batch.lengths]
    np.testing.assert_array_equal(np.asarray(out.report.kept).sum(axis=1), total)

    alone = vlc.generate(model, params, one_row(batch, 1), MIXED, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(alone.tokens[0], out.tokens[1])

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    rows = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), batch)
    split = vlc.generate(model, placed, rows, MIXED, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(split.tokens, out.tokens)
    _, state = vlc.prefill(model, placed, rows, MIXED).start(NEW)
    for store in state.stores:
        for x in (store.keys, store.values, store.key_scales, store.value_scales):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "model")), x.ndim)


def test_a_step_updates_the_state_in_place():
    model, params = tiny_llava()
    _, state = vlc.prefill(model, params, ragged_batch(rows=4), vlc.FullCache(bits=8)).start(128)
    step = jax.jit(lambda p, t, s: advance(model, p, t, s, vlc.Kernels()), donate_argnums=2)
    memory = step.lower(params, jnp.zeros((4,), jnp.int32), state).compile().memory_analysis()
    buffers = sum(x.nbytes for x in jax.tree.leaves((state.context, state.tail)))
    assert memory.alias_size_in_bytes >= buffers
    assert memory.temp_size_in_bytes < 0.5 * buffers


@pytest.mark.thorough
def test_8_bits_change_at_most_one_answer_in_a_hundred():
    vlm = vlc.load(Path(vlc.__file__).parent / "assets" / "demo_model", dtype="float32")
    same = []
    for task in ("documents", "prices"):
        samples = [make_sample(task, HELD_OUT_SEED, i, FULL_GRID, max_questions=1) for i in range(52)]
        text = [prompt(sample.questions[0][0], len(sample.images)) for sample in samples]
        batch = vlm.processor(images=[list(sample.images) for sample in samples], text=text)
        plain, stored = (
            vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1, bits=bits), 16).tokens for bits in (None, 8)
        )
        same += np.all(np.asarray(plain) == np.asarray(stored), axis=1).tolist()
    assert len(same) >= 100
    assert np.mean(same) >= 0.99


# What cannot be


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vlc.VLCache(bits=3), "bits=3 cannot be stored: use 8, 4, 2, 4/2 or float8"),
        (lambda: vlc.VLCache(bits=8.0), "bits=8.0 cannot be stored"),
        (lambda: vlc.FullCache(bits=True), "bits=True cannot be stored"),
        (lambda: vlc.Quantise(16), "Quantise: bits=16 cannot be stored"),
        (lambda: vlc.Quantise(None), "Quantise: bits=None cannot be stored"),
        (lambda: vlc.VLCache(evicted="drop"), r"evicted='drop' is not known: use Drop\(\), Merge"),
        (lambda: dataclasses.replace(vlc.VLCache(bits=4), evicted=vlc.Quantise(4)), r"not below bits=4"),
        (lambda: vlc.ZipVL(bits=2), r"zip_vl: evicted=Quantise\(2\) is not below bits=2 of the kept tokens: give"),
        (lambda: vlc.ZipVL(vlc.Bytes(10**6)), "zip_vl: budget=1000000 bytes cannot be promised with evicted=Quantise"),
        (
            lambda: dataclasses.replace(vlc.VLCache(candidate_fraction=0.5), evicted=vlc.Quantise(2)),
            "candidate_fraction=0.5 a layer loses tokens",
        ),
        (lambda: vlc.ZipVL(evicted="merge"), "evicted='merge' is not known: use 'quantise' or 'drop'"),
        (lambda: vlc.ZipVL(mass=1.0), "mass=1.0 is out of range"),
        (lambda: EnoughMass(0.0), "mass=0.0 is out of range"),
        (lambda: vlc.ByteShare(1.0), r"ByteShare\(1.0\): give a share of the bytes of a 16-bit cache, below 1"),
        (lambda: vlc.RankedBits(1.5), "budget=1.5 is out of range"),
        (lambda: vlc.RankedBits(0.1, repeat=True, rows=vlc.LastRows(4)), "rows has no use with repeat=True"),
    ],
)  # fmt: skip
def test_refused(build, message):
    with pytest.raises(vlc.PolicyError, match=message):
        build()


def test_a_share_that_cannot_hold_the_others_is_refused():
    batch = stub_batch()
    policy = dataclasses.replace(vlc.VLCache(vlc.ByteShare(0.3), bits=4), evicted=vlc.Quantise(2))
    with pytest.raises(vlc.PolicyError, match=r"0\.3 of the bytes hold no token, with the others at bits=2: give 38 %"):
        prefill(policy, batch, stub_params(batch))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_bits(name):
    build = partial(vlc.policy_by_name, name, **({"merge": None} if name == "look_m" else {}))
    assert build(bits=8).bits == 8
    assert dataclasses.replace(build(bits=8), bits=4) == build(bits=4)
