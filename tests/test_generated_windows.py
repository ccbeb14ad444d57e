"""Rules of the generated tokens in models of which some layers have a window: those keep it, the others the rule.

Queries, keys and values are given, so that a layer's outputs depend on nothing but what it attends to.
"""

import generated_references as simulated
import numpy as np
import pytest
from generated_references import Row, ragged, scripted_params
from stub_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, kept_sets

import vlcache_jax as vlc

STEPS, FULL = 45, 1
WINDOWS = (30, None, 11)  # of which prompts of 21 to 40 tokens have less and more, and answers outgrow both


def window_of(row, layer):
    """Outputs [steps, heads * d] of a layer that sees the latest tokens."""
    outs = []
    for position in range(row.n, row.n + STEPS):
        seen = list(range(max(0, position + 1 - WINDOWS[layer]), position + 1))
        outs.append(np.concatenate([row.attend(layer, head, position, seen)[1] for head in range(KV_HEADS)]))
    return np.stack(outs).reshape(STEPS, -1)


def check(policy, expected, budget=0.3):
    """Runs the policy; `expected(row, kept, [c])` simulates the full layer, from the c tokens kept of the prompt."""
    batch = ragged(seed=6)
    params = scripted_params(batch, STEPS, 6)
    for poison in (False, True):
        out, first, last = simulated.program(policy, STEPS, WINDOWS)(params, batch, poison)
        kept = kept_sets(first)
        for number in range(batch.size):
            row = Row(batch, params, number)
            caches = [[list(kept[layer][number][head]) for head in range(KV_HEADS)] for layer in range(LAYERS)]
            assert len(caches[FULL][0]) == max(1, int(budget * row.n))
            found = np.asarray(out)[:, number].reshape(STEPS, LAYERS, HEADS * HEAD_DIM)
            for layer in (0, 2):
                held = list(range(max(0, row.n - WINDOWS[layer]), row.n))
                assert all(head == held for head in caches[layer])
                np.testing.assert_allclose(found[:, layer], window_of(row, layer), atol=2e-5)
            wanted = expected(row, caches).out.reshape(found.shape)
            np.testing.assert_allclose(found[:, FULL], wanted[:, FULL], atol=2e-5)
    return first, last


def scores(row, caches, rows):
    received = row.prompt.received(rows)
    return [[{p: received[i, h, p] for p in caches[i][h]} for h in range(KV_HEADS)] for i in range(LAYERS)]


@pytest.mark.parametrize("recent", [0.5, 0.1])
def test_evict(recent):
    def expected(row, caches):
        sizes = [len(caches[layer][0]) for layer in range(LAYERS)]
        options = {"latest": lambda c: int(c * recent)}
        return simulated.evict(row, caches, scores(row, caches, range(row.n)), STEPS, sizes, **options)

    first, last = check(vlc.H2O(0.3, recent=recent, decoding="evict"), expected)
    assert first.context.nbytes == last.context.nbytes
    assert not last.tail.keys.size


@pytest.mark.parametrize("every", [30, 37])
def test_recompress(every):
    policy = vlc.SnapKV(0.3, window=8, decoding=vlc.Recompress(every, 5, recent=0.25, sinks=2))

    def expected(row, caches):
        return simulated.recompress(row, caches, STEPS, every, 5, latest=lambda c: c // 4, sinks=2)

    first, last = check(policy, expected)
    before, after = kept_sets(first), kept_sets(last)
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[FULL] != after[FULL]


@pytest.mark.parametrize("tokens", [30, 41])
def test_rolling_window(tokens):
    policy = vlc.SnapKV(0.3, window=8, decoding=vlc.RollingWindow(tokens))
    check(policy, lambda row, caches: simulated.window(row, caches, STEPS, tokens))


def test_rules_too_small_for_the_windows_say_so():
    batch, model = ragged(), simulated.ScriptedModel(windows=WINDOWS)
    params = scripted_params(batch, 1)
    for rule, text in (
        (vlc.RollingWindow(29), r"RollingWindow\(tokens=29\) holds fewer .* than the 30 .*give tokens=30 or more"),
        (vlc.Recompress(8), r"'snap_kv': Recompress\(every=8\) holds fewer .* give every=30 or more"),
    ):
        with pytest.raises(vlc.PolicyError, match=text):
            vlc.prefill(model, params, batch, vlc.SnapKV(budget=0.5, decoding=rule))
    alone = simulated.ScriptedModel(windows=(30, 9, 11))
    with pytest.raises(vlc.PolicyError, match=r"Evict rewrites what layers keep, but all layers of this model have"):
        vlc.prefill(alone, params, batch, vlc.H2O(budget=0.5, decoding="evict"))
