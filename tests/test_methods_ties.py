"""Tokens that tie: by position, or by what the method says, and the same in any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import HEAD_DIM, KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_methods_promises import row_alone
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cache.selection import candidates, protected_first, select_layers
from vlcache_jax.kernels.column_statistics import ColumnStatistics
from vlcache_jax.policies import AccumulatedAttention, DiversityMixed, LayerInputs, StrengthAndSkewness
from vlcache_jax.policies.scores.rounding import without_rounding


def prefill(policy, batch, params):
    return vlc.prefill(StubModel(), params, batch, policy).start(4)[1]


@jax.jit
def rotated(key):
    layers, batch, length, heads, size = key.shape
    positions = jnp.broadcast_to(jnp.arange(length), (layers * batch, length))
    return StubModel().rotate(key.reshape(-1, length, heads, size).astype(jnp.float32), positions).reshape(key.shape)


def repeated_keys(batch, seed, kinds=3):
    """Parameters whose keys are of a few kinds, each rotated at its position."""
    rng = np.random.default_rng(seed)
    params = stub_params(batch, seed)
    table = rng.normal(size=(LAYERS, kinds, KV_HEADS, HEAD_DIM))
    kind = rng.integers(0, kinds, (batch.size, batch.length))
    params["key"] = np.asarray(rotated(jnp.asarray(table[:, kind])))
    return params, np.linalg.norm(table, axis=-1), kind


@pytest.mark.parametrize("seed", range(4))
def test_keys_of_equal_norm_tie_by_position(seed):
    """Their rotation rounds, and that must not decide."""
    batch = stub_batch(seed=seed)
    params, norm, kind = repeated_keys(batch, seed)
    state = prefill(vlc.KeyNorm(0.4), batch, params)
    kept = kept_sets(state)
    for row, n in enumerate(batch.lengths):
        for layer in range(LAYERS):
            slots = int(state.allocation.requested[row, layer])
            latest = max(1, slots // 10)
            for head in range(KV_HEADS):
                order = sorted(range(n - latest), key=lambda j: (norm[layer, kind[row, j], head], j))
                assert kept[layer][row][head] == sorted([*order[: slots - latest], *range(n - latest, n)])


def test_they_tie_alike_in_any_batch():
    batch = stub_batch()
    params, *_ = repeated_keys(batch, 0)
    policy = vlc.KeyNorm(0.4)
    together = kept_sets(prefill(policy, batch, params))
    for row in range(batch.size):
        one, own = row_alone(batch, params, row, batch.length + 9)
        own["key"] = own["key"] * (1 + 1e-7)  # as another order of sums would change it
        alone = kept_sets(prefill(policy, one, own))
        assert [layer[row] for layer in together] == [layer[0] for layer in alone]


def test_a_prompt_of_one_token_keeps_its_first_and_last_ones():
    model, params = tiny_llava()
    batch = ragged_batch(rows=3)
    tokens = np.where(np.arange(batch.length) < batch.lengths[:, None], 9, 0).astype(np.int32)
    batch = dataclasses.replace(batch, tokens=tokens, vision_index=np.full_like(batch.vision_index, -1))
    policy = vlc.KeyNorm(0.4)
    together = kept_sets(vlc.prefill(model, params, batch, policy).start(4)[1])
    for row, n in enumerate(batch.lengths):
        alone = kept_sets(vlc.prefill(model, params, one_row(batch, row), policy).start(4)[1])
        for layer in range(3):
            assert together[layer][row] == alone[layer][0]
            for head in together[layer][row]:
                latest = max(1, len(head) // 10)
                assert head == [*range(len(head) - latest), *range(n - latest, n)]


def test_norms_with_a_gap_stay_apart():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.random((2, 3, 500)) + 1, jnp.float32)
    valid = jnp.asarray(rng.random((2, 3, 500)) < 0.8)
    found = np.asarray(without_rounding(values, valid))
    np.testing.assert_allclose(found, values, rtol=1e-4)
    assert np.all(found <= values)
    np.testing.assert_array_equal(found[~valid], values[~valid])
    for row in np.ndindex(2, 3):
        own = np.sort(np.asarray(values[row])[np.asarray(valid[row])].astype(np.float64))
        groups = 1 + np.sum(np.diff(own) > 2.0**-19 * own[1:])
        assert len(np.unique(found[row][np.asarray(valid[row])])) == groups
    # Padding bridges no gap, and what is not finite stays what it is.
    values, valid = jnp.array([1.0, 1 + 1e-6, 1 + 3e-6, jnp.nan, jnp.inf]), jnp.array([True, False, True, True, True])
    assert without_rounding(values, valid)[:3].tolist() == values[:3].tolist()
    assert not np.isfinite(without_rounding(values, valid)[3:]).any()


# What stretches scores must not stretch their rounding


def layer_inputs(value, sums, lengths, vision_index):
    batch = len(value)
    key = np.random.default_rng(0).normal(size=value.shape)
    return LayerInputs(
        query=jnp.asarray(key, jnp.float32),
        key=jnp.asarray(key, jnp.float32),
        value=jnp.asarray(value, jnp.float32),
        lengths=jnp.asarray(lengths),
        vision_index=jnp.asarray(vision_index),
        layer=jnp.int32(0),
        density=jnp.ones(batch),
        rows=jnp.asarray(lengths),
        statistics=ColumnStatistics(*(jnp.asarray(sums, jnp.float32) for _ in ColumnStatistics._fields)),
    )


def test_values_of_equal_norm_weigh_alike_in_mix_kv():
    rng = np.random.default_rng(1)
    same = np.broadcast_to(rng.normal(size=(1, 1, KV_HEADS, HEAD_DIM)), (1, 30, KV_HEADS, HEAD_DIM))
    turned = np.asarray(rotated(jnp.asarray(same[None], jnp.float32)))[0]
    norm = np.linalg.norm(turned, axis=-1)
    assert np.ptp(norm) > 0, "rounding"
    sums = rng.random((1, KV_HEADS, 30))
    scores = [
        DiversityMixed(AccumulatedAttention())(layer_inputs(x, sums, [26], np.full((1, 30), -1)))[..., :26]
        for x in (same, turned)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


def test_a_skewness_of_rounding_gives_a_layer_no_slots():
    value, index = np.zeros((3, 20, KV_HEADS, HEAD_DIM)), np.full((3, 20), -1)
    index[0, 3:5], index[1, 3:19], index[2, 3:19] = [0, 1], np.arange(16), np.arange(16)
    rng = np.random.default_rng(2)
    scores = rng.random((3, KV_HEADS, 20))
    scores[1] = 0.3 * (1 + 1e-7 * rng.normal(size=(KV_HEADS, 20)))  # two visual tokens; equal scores; others
    measured = StrengthAndSkewness().measure(
        layer_inputs(value, scores, [20] * 3, index), jnp.asarray(scores, jnp.float32)
    )
    assert measured[:2, 1].tolist() == [0, 0]
    assert abs(measured[2, 1]) > 0.01


# Maximum pooling makes plateaus: the token that the maximum comes from goes first, then those with the larger own score


def test_of_a_plateau_the_maximum_itself_is_kept():
    batch = stub_batch()
    params = stub_params(batch)
    own = prefill(vlc.SnapKV(0.2, recent=0.0, pool=1), batch, params)
    pooled = prefill(vlc.SnapKV(0.2, recent=0.0, pool=5, pooling="max"), batch, params)
    for row in range(batch.size):
        for layer in range(LAYERS):
            for best, kept in zip(kept_sets(own)[layer][row], kept_sets(pooled)[layer][row]):
                # Slots for a plateau or less: the best token of all is in it, not four neighbours to its left.
                assert set(best) & set(kept) - {batch.lengths[row] - 1} or len(kept) < 2


def test_ties_by_the_second_score_then_by_position():
    scores = jnp.array([[[5.0, 5.0, 5.0, 5.0, 1.0, 9.0]]])
    ties = jnp.array([[[0.0, 2.0, 1.0, 2.0, 7.0, 0.0]]])
    positions, lengths, one = jnp.arange(6)[None, None], jnp.array([6]), jnp.array([1])
    for slots, wanted in ((2, [1, 5]), (3, [1, 3, 5]), (4, [1, 2, 3, 5]), (5, [0, 1, 2, 3, 5])):
        stacked = (x[None] for x in (jnp.array([slots]), one, 0 * one, ties))
        kept, _ = select_layers(scores[None], positions[None], lengths, *stacked)
        assert kept[0, 0, 0, :slots].tolist() == wanted
        few = candidates(scores, lengths, slots, one, 0 * one, ties)
        assert few[0, 0].tolist() == wanted
    ranks = protected_first(scores, lengths, jnp.array([[False] * 4 + [True, False]]), ties)
    assert ranks[0, 0].tolist() == [0, 3, 1, 2, 5, 4]


@pytest.mark.parametrize("grid_side", [None, 4])
def test_candidates_contain_what_ties_choose(grid_side):
    batch = stub_batch(seed=2)
    params = stub_params(batch, 2)
    all_of_them, few = (
        kept_sets(prefill(vlc.SnapKV(0.3, window=4, pool=3, pooling="max", grid_side=grid_side, **o), batch, params))
        for o in ({}, {"candidate_fraction": 0.5})
    )
    assert all_of_them == few
