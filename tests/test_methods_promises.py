"""Promises that every method keeps about what it keeps, on bare queries, keys and values (`stub_model.py`)."""

import dataclasses

import jax
import numpy as np
import pytest
from stub_model import HEAD_DIM, KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_promises import METHODS, NEWER, over

import vlcache_jax as vlc
from vlcache_jax.inference.finiteness import require_finite
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.policies import METHODS as KNOWN
from vlcache_jax.policies import GridPooled, MaskVisualSinks

methods = over(METHODS, thorough=NEWER)
BITS = ("vl_cache", "snap_kv", "key_norm", "key_difference", "mix_kv", "expected_attention")  # a kind of score each


def prefill(policy, batch, params):
    return vlc.prefill(StubModel(), params, batch, policy).start(4)[1]


def told(policy, batch, params):
    """What is raised for a state of which something is not finite; `prefill` itself only notes it."""
    state = prefill(policy, batch, params)
    require_finite(state.finite, state, dtype="float32", density=state.allocation.density, policy=policy)


def row_alone(batch, params, row, length):
    """One row padded to `length`; its padding holds NaN."""
    n = int(batch.lengths[row])

    def cut(x, axis, fill):
        x = np.take(x, np.arange(n), axis=axis)
        return np.pad(x, [(0, length - n if i == axis else 0) for i in range(x.ndim)], constant_values=fill)

    one = dataclasses.replace(
        batch,
        tokens=np.zeros((1, length), np.int32),
        lengths=batch.lengths[row : row + 1],
        vision_index=cut(batch.vision_index[row : row + 1], 1, -1),
        pixels=batch.pixels[row : row + 1],
    )
    return one, {name: cut(x[:, row : row + 1], 2, np.nan) for name, x in params.items()}


@over(METHODS, thorough=NEWER, bits=BITS)
def test_a_row_keeps_what_it_keeps_alone_and_padding_is_never_looked_at(policy):
    batch = stub_batch()
    params = stub_params(batch)
    together = prefill(policy, batch, params)
    kept = kept_sets(together)
    for row in range(batch.size):
        alone = prefill(policy, *row_alone(batch, params, row, batch.length + 13))
        np.testing.assert_array_equal(alone.allocation.requested[0], together.allocation.requested[row])
        for layer, own in enumerate(kept_sets(alone)):
            assert kept[layer][row] == own[0]
            assert all(head[-1] == batch.lengths[row] - 1 for head in own[0]), "the last prompt token is always kept"


@pytest.mark.parametrize(
    "policy",
    [vlc.VLCache(0.3), vlc.KeyNorm(0.3), vlc.LookM(0.3, merge=None, candidate_fraction=0.5)],
    ids=lambda p: p.name,
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error(policy, bad):
    batch = stub_batch()
    params = stub_params(batch)
    params["key"][1, 2, 0] = bad
    with pytest.raises(vlc.CheckpointError, match=f"policy '{policy.name}': layer 1 has scores .* row 2 .*FullCache"):
        told(policy, batch, params)
    density = np.asarray(jax.jit(lambda p: prefill(policy, batch, p).allocation.density)(params))
    assert np.argwhere(np.isnan(density)).tolist() == [[2, 1]]  # [row, layer]: the others are untouched


@methods
def test_every_method_that_looks_at_the_keys_sees_what_is_not_finite(policy):
    batch = stub_batch()
    params = stub_params(batch)
    params["key"][1, 0, 3] = np.nan  # of a visual token
    if policy.name in ("streaming_llm", "random"):
        prefill(policy, batch, params)
    else:
        with pytest.raises(vlc.CheckpointError, match=f"policy '{policy.name}': layer 1 has scores.* row 0 "):
            told(policy, batch, params)


def test_every_method_has_a_place_among_these():
    assert {policy.name for policy in METHODS.values()} == set(KNOWN) - {"full_cache"}


def test_another_grid_than_the_models_is_refused_before_anything_runs():
    batch = stub_batch()
    for policy in (vlc.SnapKV(0.3, pool=3, grid_side=6), vlc.LookM(0.3)):
        wrapped = dataclasses.replace(policy, score=MaskVisualSinks(GridPooled(policy.score, 3, "mean", 6)))
        with pytest.raises(vlc.PolicyError, match=r"grid_side=6, but this model has 4 patches .* use grid_side=4"):
            vlc.prefill(StubModel(), {}, batch, wrapped).start(4)
    with pytest.raises(vlc.PolicyError, match="the visual tokens of this model are no grid"):
        check_prefill(
            dataclasses.replace(StubModel().spec, vision_grid=0), batch, vlc.VLCache(0.3, pool=3, grid_side=4), 4
        )
    anything = dataclasses.replace(StubModel().spec, vision_grid=None)
    check_prefill(anything, batch, vlc.VLCache(0.3, pool=3, grid_side=9), 4)


def test_what_nothing_scores_is_no_error():
    batch = stub_batch()
    params = stub_params(batch)
    params["key"][1, 2, 0] = np.nan
    prefill(vlc.StreamingLLM(0.4), batch, params)
    prefill(vlc.FullCache(), batch, params)


SLOT = KV_HEADS * (2 * HEAD_DIM * 4 + 4)  # bytes: key and value in float32, position


@pytest.mark.parametrize("pool", [48, 96, 5000])
@pytest.mark.parametrize("method", [vlc.VLCache, vlc.PrefixKV])
def test_a_budget_in_bytes_is_what_a_prompt_takes(pool, method):
    count = pool * SLOT + 2 * 4 * LAYERS
    batch = stub_batch()
    state = prefill(method(vlc.Bytes(count)), batch, stub_params(batch))
    real = sum(x.nbytes for x in jax.tree.leaves(state.context)) / batch.size
    assert real <= count
    kept = np.asarray(state.context.lengths).sum(axis=(1, 2))
    room = pool // 16 * 16 - 15 * LAYERS
    np.testing.assert_array_equal(kept, np.minimum(room, LAYERS * batch.lengths))
    if pool == 5000:  # more than these prompts need: no more than that is allocated
        assert real <= SLOT * (LAYERS * batch.length + 16 * (LAYERS + 1))
    else:
        assert real == count


def test_bytes_that_hold_nothing_are_refused():
    batch = stub_batch()
    with pytest.raises(vlc.PolicyError, match="cannot hold one token for each of the 3 layers: give at least"):
        prefill(vlc.VLCache(vlc.Bytes(1000)), batch, stub_params(batch))


def test_tokens_keep_the_whole_of_a_shorter_prompt():
    batch = stub_batch()
    state = prefill(vlc.SnapKV(32, window=4), batch, stub_params(batch))
    for layer in kept_sets(state):
        for n, heads in zip(batch.lengths, layer):
            assert [len(head) for head in heads] == [min(n, 32)] * KV_HEADS
            assert n > 32 or heads == [list(range(n))] * KV_HEADS
