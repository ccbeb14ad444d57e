"""Every rule of the generated tokens against its definition, token by token, over answers far beyond its room."""

import math
from fractions import Fraction

import generated_references as simulated
import jax
import method_references as reference
import numpy as np
import pytest
from generated_references import Row, ragged, scripted_params
from stub_model import KV_HEADS, LAYERS, kept_sets

import vlcache_jax as vlc

STEPS = 45


def run(policy, batch, params):
    return simulated.program(policy, STEPS)(params, batch)


def prompt_caches(scores, slots, **options):
    """[layer][head] lists of what the prefill keeps, from scores [layers, heads, n]."""
    return [
        [reference.keep(scores[i, min(h, scores.shape[1] - 1)], slots[i], **options) for h in range(KV_HEADS)]
        for i in range(LAYERS)
    ]


def weights(scores, caches):
    return [
        [{p: scores[i, min(h, scores.shape[1] - 1), p] for p in caches[i][h]} for h in range(KV_HEADS)]
        for i in range(LAYERS)
    ]


def check(row, number, out, simulation):
    np.testing.assert_allclose(np.asarray(out)[:, number], simulation.out, atol=2e-5)


def fraction_slots(n, budget):
    return reference.uniform(LAYERS, max(LAYERS, math.floor(LAYERS * n * Fraction(str(budget)))))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget", [0.3, 24, 100])
def test_h2o(budget, seed):
    batch = ragged(seed=seed)
    params = scripted_params(batch, STEPS, seed)
    out, _, last = run(vlc.H2O(budget, decoding="evict"), batch, params)
    held = kept_sets(last)
    for number in range(batch.size):
        row = Row(batch, params, number)
        scores = row.prompt.received(range(row.n))
        sizes = [budget] * LAYERS if budget > 1 else fraction_slots(row.n, budget)
        caches = prompt_caches(scores, [min(s, row.n) for s in sizes], window=Fraction(1, 2))
        expected = simulated.evict(row, caches, weights(scores, caches), STEPS, sizes, latest=lambda c: c // 2)
        check(row, number, out, expected)
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                now, stays = sorted(held[layer][number][head]), expected.caches[-1][layer][head]
                assert set(stays) <= set(now)
                assert len(now) == min(sizes[layer] + 1, row.n + STEPS)  # one more: the next step overwrites it


@pytest.mark.parametrize("budget", [0.3, 24])
def test_tova(budget):
    batch = ragged(seed=2)
    params = scripted_params(batch, STEPS, 2)
    out, _, last = run(vlc.TOVA(budget, decoding="evict"), batch, params)
    held = kept_sets(last)
    for number in range(batch.size):
        row = Row(batch, params, number)
        scores = row.prompt.received([row.n - 1], shared=True)
        sizes = [budget] * LAYERS if budget > 1 else fraction_slots(row.n, budget)
        caches = prompt_caches(scores, [min(s, row.n) for s in sizes], window=0)
        options = {"last": True, "shared": True, "latest": lambda c: 0}
        expected = simulated.evict(row, caches, weights(scores, caches), STEPS, sizes, **options)
        check(row, number, out, expected)
        for layer in range(LAYERS):
            heads = [sorted(head) for head in held[layer][number]]
            assert heads[0] == heads[1]
            assert set(expected.caches[-1][layer][0]) <= set(heads[0])


def test_streaming_llm_moves_its_window_on():
    batch = ragged(seed=3)
    params = scripted_params(batch, STEPS, 3)
    out, _, _ = run(vlc.StreamingLLM(12, decoding="evict"), batch, params)
    for number in range(batch.size):
        row = Row(batch, params, number)

        def step(caches, layer, position, out, row=row):
            cache = [*range(4), *range(max(4, position - 8), position + 1)]  # 4 sinks, 8 recent ones and its own
            for head in range(KV_HEADS):
                part = slice(head * simulated.GROUP, (head + 1) * simulated.GROUP)
                out[layer, part] = row.attend(layer, head, position, cache)[1]

        check(row, number, out, simulated._run(row, [], STEPS, step))


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_rolling_window(tokens):
    batch = ragged(seed=4)
    params = scripted_params(batch, STEPS, 4)
    policy = vlc.StreamingLLM(0.3, decoding=f"window:{tokens}")
    out, first, last = run(policy, batch, params)
    for number in range(batch.size):
        row = Row(batch, params, number)
        slots = fraction_slots(row.n, 0.3)
        caches = [[[*range(4), *range(row.n - s + 4, row.n)]] * KV_HEADS for s in slots]
        check(row, number, out, simulated.window(row, caches, STEPS, tokens))
    assert jax.tree.all(jax.tree.map(np.array_equal, first.context, last.context))


@pytest.mark.parametrize(("every", "rows"), [(8, 3), (7, None), (20, 20), (1, 1)])
def test_recompression_of_segments_that_differ_in_length(every, rows):
    batch = ragged(seed=5)
    params = scripted_params(batch, STEPS, 5)
    policy = vlc.VLCache(0.3, recent=0.25)
    policy = vlc.Policy(**{f: getattr(policy, f) for f in policy.__dataclass_fields__} | {
        "sinks": 2, "decoding": vlc.Recompress(every, rows)})  # fmt: skip
    out, first, last = run(policy, batch, params)
    kept, held = kept_sets(first), kept_sets(last)
    np.testing.assert_array_equal(first.context.lengths, last.context.lengths)
    assert len(set(np.asarray(first.context.lengths)[0, :, 0].tolist())) > 1
    for number in range(batch.size):
        row = Row(batch, params, number)
        caches = [[list(kept[layer][number][head]) for head in range(KV_HEADS)] for layer in range(LAYERS)]
        options = {"latest": lambda c: c // 4, "sinks": 2}
        expected = simulated.recompress(row, caches, STEPS, every, rows or min(every, 32), **options)
        check(row, number, out, expected)
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                assert sorted(held[layer][number][head]) == expected.caches[-1][layer][head]
