"""Budgets in retained attention: what is kept holds the share, below the cap."""

import math

import numpy as np
import pytest
from stub_model import HEADS, KV_HEADS, LAYERS, StubModel, kept_sets, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.policies.budget import budget_text

METHODS = {
    "snap_kv": vlc.SnapKV(vlc.Mass(0.8, cap=0.75), window=4, pool=1),
    "vl_cache": vlc.VLCache(vlc.Mass(0.8, cap=0.75), recent=0.3),
    "ada_kv": vlc.AdaKV(vlc.Mass(0.8, cap=0.75), window=4, pool=1),
    "air_cache": vlc.AirCache(vlc.Mass(0.8, cap=0.75), ratio=0.2),
}


def received(batch, params, row, rows):
    """Attention from the last `rows` rows, f64 [layers, kv_heads, n]."""
    n = int(batch.lengths[row])
    query, key = (params[name][:, row, :n].astype(np.float64) for name in ("query", "key"))
    key = np.repeat(key, HEADS // KV_HEADS, axis=2)
    logits = np.einsum("lthd,lshd->lhts", query, key) / math.sqrt(key.shape[-1])
    weights = np.where(np.tril(np.ones((n, n), bool)), np.exp(logits - logits.max()), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights[:, :, n - rows :].sum(axis=2).reshape(LAYERS, KV_HEADS, -1, n).mean(axis=2)


@pytest.mark.parametrize("name", ["snap_kv", "vl_cache", "ada_kv"])
def test_what_is_kept_holds_the_share(name):
    policy, within = METHODS[name], 0
    for seed in range(4):
        batch = stub_batch(seed=seed)
        params = stub_params(batch, seed)
        state = vlc.prefill(StubModel(), params, batch, policy).start(4)[1]
        kept = kept_sets(state)
        for row, n in enumerate(batch.lengths):
            _, rows = policy.rows.span(batch.lengths, batch.vision_mask)
            scores = received(batch, params, row, int(rows[row]))
            used = sum(len(head) for layer in kept for head in layer[row])
            cap = KV_HEADS * max(LAYERS, math.floor(0.75 * LAYERS * n))
            assert used <= cap
            if used == cap:
                continue
            within += 1
            for layer in range(LAYERS):
                held = sum(scores[layer, head][kept[layer][row][head]].sum() for head in range(KV_HEADS))
                assert held >= (0.8 - 1e-5) * scores[layer].sum()
    assert within > 5


def test_the_method_s_own_layer_budgets_take_no_part():
    mass = vlc.Mass(0.8, cap=0.75)
    assert vlc.PyramidKV(mass, window=4).sharing == vlc.SnapKV(mass, window=4).sharing
    assert vlc.PyramidKV(0.3, window=4).sharing == vlc.PyramidKV(0.3, window=4).allocate
    assert vlc.VLCache(mass).sharing.threshold is None  # the density is not even measured
    assert vlc.AdaKV(mass).sharing.per_head


def test_air_cache_keeps_its_text_and_the_share_of_the_visual_scores():
    batch = stub_batch()
    state = vlc.prefill(StubModel(), stub_params(batch), batch, METHODS["air_cache"]).start(4)[1]
    kept = kept_sets(state)
    for layer in range(LAYERS):
        for row in (0, 1, 3):
            text = set(np.flatnonzero(batch.vision_index[row, : batch.lengths[row]] == -1))
            for head in kept[layer][row]:
                assert text <= set(head)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vlc.Mass(0.98), r"Mass\(0.98\) has no cap: the size of the store .* Mass\(0.98, cap=0.4\)"),
        (lambda: vlc.Mass(1.0, cap=0.5), r"Mass\(1.0\): give the share .* below 1 \(budget=1.0 keeps all\)"),
        (lambda: vlc.Mass(True, cap=0.5), r"Mass\(True\): give the share"),
        (lambda: vlc.Mass(0.9, cap=0.0), r"Mass\(0.9, cap=0.0\): give a cap in \(0, 1\]"),
        (
            lambda: vlc.KeyNorm(vlc.Mass(0.9, cap=0.5)),
            "key_norm: a budget of 90 % of the attention, at most 50 % needs",
        ),
        (lambda: vlc.StreamingLLM(vlc.Mass(0.9, cap=0.5)), "streaming_llm: .*Recency is not"),
        (lambda: vlc.RandomEviction(vlc.Mass(0.9, cap=0.5)), "random: .*RandomScore is not"),
        (lambda: vlc.ExpectedAttention(vlc.Mass(0.9, cap=0.5)), "expected_attention: .*ExpectedScore is not"),
        (
            lambda: vlc.SnapKV(vlc.Mass(0.9, cap=0.5), candidate_fraction=0.4),
            "candidate_fraction=0.4 is below budget=90 % of the attention, at most 50 %",
        ),
        (lambda: vlc.VLCache(1.5), r"budget=1.5 is out of range.*or Mass\(share, cap\)"),
    ],
)
def test_budgets_that_cannot_be(build, message):
    with pytest.raises(vlc.PolicyError, match=message):
        build()


def test_in_words():
    assert budget_text(vlc.Mass(0.98, cap=0.4)) == "98 % of the attention, at most 40 %"
    assert f"{vlc.Mass(0.5, cap=1.0)}" == "50 % of the attention, at most 100 %"
