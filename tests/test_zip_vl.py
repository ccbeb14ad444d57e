"""ZipVL's cache against its definition in plain numpy, over random ragged batches."""

import method_references as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_model import KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_methods_references import prompt_of, total_of

import vlcache_jax as vlc

quick = settings(max_examples=10, deadline=None, derandomize=True)


def definition(prompt, total, mass, window):
    """(slots of each layer, normalised scores [layers, n]). Where the cap binds, the common share is bisected."""
    received = reference.last_rows(prompt, window, shared=True)[:, 0]
    rows = range(max(0, prompt.n - window), prompt.n)
    seen = np.array([sum(q >= j for q in rows) for j in range(prompt.n)])
    shares = [np.cumsum(np.sort(layer)[::-1]) / layer.sum() for layer in received]

    def fewest(p):
        return [int(np.sum(share < p)) + 1 for share in shares]

    slots = fewest(mass)
    if sum(slots) > total:
        small, large = 0.0, mass
        for _ in range(100):
            middle = (small + large) / 2
            small, large = (middle, large) if sum(fewest(middle)) <= total else (small, middle)
        slots = fewest(small)
    return slots, received / seen


@pytest.mark.parametrize(("mass", "budget", "binds"), [(0.6, 0.9, False), (0.95, 0.4, True)])
@quick
@given(seed=st.integers(0, 10_000))
def test_kept_sets_equal_the_definition(mass, budget, binds, seed):
    policy = vlc.ZipVL(budget, mass=mass, window=7)
    batch = stub_batch(seed=seed)
    params = stub_params(batch, seed)
    _, state = vlc.prefill(StubModel(), params, batch, policy).start(4)
    kept, bound = kept_sets(state), []
    for row in range(batch.size):
        prompt = prompt_of(batch, params, row)
        total = total_of(policy, prompt.n)
        slots, scores = definition(prompt, total, mass, 7)
        np.testing.assert_array_equal(state.allocation.requested[row], slots)
        bound.append(sum(slots) == total)
        for layer in range(LAYERS):
            wanted = reference.keep(scores[layer], slots[layer], window=0)
            assert kept[layer][row] == [wanted] * KV_HEADS, (row, layer)
    assert any(bound) == binds


def test_both_versions_keep_the_same_and_one_keeps_the_rest_too():
    batch = stub_batch()
    params = stub_params(batch)
    first, second = (
        vlc.prefill(StubModel(), params, batch, vlc.ZipVL(0.5, mass=0.8, evicted=kind)).start(4)[1]
        for kind in ("quantise", "drop")
    )
    assert kept_sets(first) == kept_sets(second)
    assert (first.context.bits, first.more[0].bits, second.more) == (4, 2, ())
    both = np.asarray(first.context.lengths + first.more[0].lengths)[..., 0]
    np.testing.assert_array_equal(both, np.broadcast_to(batch.lengths[:, None], both.shape))
