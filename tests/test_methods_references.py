"""Every method keeps exactly the tokens that its definition in plain numpy keeps, in every layer and KV head."""

import math
from fractions import Fraction
from functools import partial

import method_references as reference
import newer_references as newer
import numpy as np
import pytest
from stub_model import HEAD_DIM, KV_HEADS, LAYERS, OUTPUT, SIDE, StubModel, kept_sets, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.policies import AccumulatedAttention, SequencePooled

HEAD_SCORES = [[0.1, 0.4, 0, 0], [3, 5, 0.2, 0.8], [0.3, 0.3, 0.9, 0]]


def zip_vl(prompt, total, mass, window):
    """The cap is above what these prompts need; test_zip_vl.py has the other case."""
    received = reference.last_rows(prompt, window, shared=True)
    ranked = np.sort(received[:, 0], axis=1)[:, ::-1]
    slots = [int(np.sum(np.cumsum(layer) < mass * layer.sum())) + 1 for layer in ranked]
    seen = [min(window, prompt.n - j) for j in range(prompt.n)]
    return slots, received / np.array(seen)


def grid(kind):
    return lambda prompt, scores: reference.pool_grid(scores, prompt.index, 3, kind, SIDE)


def sequence(kind):
    return lambda prompt, scores: reference.pool_sequence(scores, 3, kind)


def rotation(position):
    """Of the stub's rotary embedding, from its definition: pair i turns by position * 100^(-2 i / d)."""
    matrix, half = np.zeros((HEAD_DIM, HEAD_DIM)), HEAD_DIM // 2
    for i in range(half):
        turn = np.exp(1j * position * 100.0 ** (-i / half))
        matrix[i, i] = matrix[i + half, i + half] = turn.real
        matrix[i + half, i], matrix[i, i + half] = turn.imag, -turn.imag
    return matrix


def snap_shared_on_the_grid(prompt, total):
    votes = reference.last_rows(prompt, 5, shared=True)
    return reference.uniform(LAYERS, total), reference.pool_grid(votes, prompt.index, 3, "max", SIDE)


def pyramid(window, rows=None):
    return lambda prompt, total: reference.pyramid_kv(prompt, total, window, 3, rows=rows)[0]


def mass_of_votes(share, window, size):
    method = partial(reference.snap_kv, window=window, size=size, kind="max")
    return lambda prompt, total: reference.by_mass(prompt, total, method, share, window)[0]


def total_attention(prompt, total):
    return None, prompt.received(range(prompt.n))


# name -> policy, its reference, window (a fraction of the slots, tokens, or a function of the prompt and the slots of
# all layers), sinks, whether text goes first
CASES = {
    "vl_cache_tokens": (vlc.VLCache(budget=9), reference.vl_cache, 0.1, 0, False),
    "vl_cache_pooled": (vlc.VLCache(0.3, pool=3), partial(reference.vl_cache, change=sequence("mean")), 0.1, 0, False),
    "vl_cache_grid": (
        vlc.VLCache(0.3, pool=3, grid_side=SIDE),
        partial(reference.vl_cache, change=grid("mean")), 0.1, 0, False,
    ),
    "vl_cache_masked": (
        vlc.VLCache(0.4, mask_visual_sinks=True),
        partial(reference.vl_cache, change=reference.mask_sinks), 0.1, 0, False,
    ),
    "streaming_llm": (vlc.StreamingLLM(0.4), reference.streaming_llm, 1.0, 4, False),
    "h2o": (vlc.H2O(0.3), reference.h2o, 0.5, 0, False),
    "h2o_normalised": (vlc.H2O(0.3, normalised=True), partial(reference.h2o, normalised=True), 0.5, 0, False),
    "snap_kv": (vlc.SnapKV(0.4, window=4), partial(reference.snap_kv, window=4, size=5), 4, 0, False),
    "snap_kv_max": (
        vlc.SnapKV(10, window=3, pool=3, pooling="max", candidate_fraction=0.5),
        partial(reference.snap_kv, window=3, size=3, kind="max"), 3, 0, False,
    ),
    "snap_kv_shared_grid": (
        vlc.SnapKV(0.3, window=5, pool=3, pooling="max", grid_side=SIDE, heads="shared", recent=0.2),
        snap_shared_on_the_grid, 0.2, 0, False,
    ),
    "snap_kv_capped": (
        vlc.SnapKV(0.4, window=4, recent=vlc.Window(6)),
        partial(reference.snap_kv, window=reference.capped_window(6), rows=4, size=5),
        reference.capped_window(6), 0, False,
    ),
    "snap_kv_default": (
        vlc.SnapKV(0.4, pooling="max"),
        partial(reference.snap_kv, window=reference.capped_window(32), rows=32, size=5, kind="max"),
        reference.capped_window(32), 0, False,
    ),
    "pyramid_kv_capped": (
        vlc.PyramidKV(0.45, window=3, pool=3, recent=vlc.Window(7)),
        partial(reference.pyramid_kv, window=reference.capped_window(7), rows=3, size=3),
        reference.capped_window(7), 0, False,
    ),
    "ada_kv_capped": (
        vlc.AdaKV(0.4, window=4, recent=vlc.Window(6)),
        partial(reference.ada_kv, window=reference.capped_window(6), rows=4, size=7),
        reference.capped_window(6), 0, False,
    ),
    "ada_kv_pyramid_capped": (
        vlc.AdaKV(0.4, window=4, recent=vlc.Window(6), pyramid=True, pool=3),
        partial(
            reference.ada_kv, window=reference.capped_window(6), rows=4, size=3,
            layers=pyramid(reference.capped_window(6), rows=4),
        ),
        reference.capped_window(6), 0, False,
    ),
    "mix_kv_capped": (
        vlc.MixKV(0.4, window=4, pool=3, recent=vlc.Window(6)),
        partial(reference.mix_kv, window=reference.capped_window(6), rows=4, size=3),
        reference.capped_window(6), 0, False,
    ),
    "pyramid_kv": (
        vlc.PyramidKV(0.45, window=3, pool=3),
        partial(reference.pyramid_kv, window=3, size=3), 3, 0, False,
    ),
    "ada_kv": (vlc.AdaKV(0.4, window=4), partial(reference.ada_kv, window=4, size=7), 4, 0, False),
    "ada_kv_pyramid": (
        vlc.AdaKV(16, window=3, pool=3, pooling="mean", floor_alpha=0.5, pyramid=True),
        partial(reference.ada_kv, window=3, size=3, kind="mean", floor=0.5, layers=pyramid(3)), 3, 0, False,
    ),
    "ada_kv_mass": (
        vlc.AdaKV(vlc.Mass(0.9, cap=0.7), window=4, candidate_fraction=0.95),
        partial(reference.ada_kv, window=4, size=7, layers=mass_of_votes(0.9, 4, 7)), 4, 0, False,
    ),
    "snap_kv_mass": (
        vlc.SnapKV(vlc.Mass(0.8, cap=0.7), window=4),
        partial(reference.by_mass, method=partial(reference.snap_kv, window=4, size=5), share=0.8, window=4),
        4, 0, False,
    ),
    "vl_cache_mass": (
        vlc.VLCache(vlc.Mass(0.85, cap=0.8), recent=0.3),
        partial(reference.by_mass, method=reference.vl_cache, share=0.85, window=0.3), 0.3, 0, False,
    ),
    "prefix_kv_mass": (
        vlc.PrefixKV(vlc.Mass(0.9, cap=0.45)),
        partial(reference.by_mass, method=reference.prefix_kv, share=0.9, window=0.0, sinks=4), 0.0, 4, False,
    ),
    "look_m_mass": (
        vlc.LookM(vlc.Mass(0.95, cap=0.9), recent=0.25, selection="code"),
        partial(reference.by_mass, method=total_attention, share=0.95, window=0.25, text_first=True), 0.25, 0, True,
    ),
    "tova": (vlc.TOVA(0.3), reference.tova, 0.0, 0, False),
    "look_m": (vlc.LookM(0.35), reference.look_m, 0.5, 0, False),
    "look_m_code": (vlc.LookM(0.3, selection="code", merge=None), reference.h2o, 0.5, 0, True),
    "prefix_kv": (vlc.PrefixKV(0.4), reference.prefix_kv, 0.0, 4, False),
    "zip_vl": (
        vlc.ZipVL(0.9, mass=0.6, window=5),
        partial(zip_vl, mass=0.6, window=5), 0.0, 0, False,
    ),
    "air_cache": (vlc.AirCache(0.6, ratio=0.2), partial(reference.air_cache, ratio=0.2), 0.0, 0, True),
    "mix_kv": (vlc.MixKV(0.4, window=4, pool=3), partial(reference.mix_kv, window=4, size=3), 4, 0, False),
    "expected_attention": (
        vlc.ExpectedAttention(0.3, sinks=2, future=20),
        partial(reference.expected_attention, rotation=rotation, sinks=2, future=20), 0.0, 2, False,
    ),
    "tgv_kv": (vlc.TGVKV(0.5), newer.tgv_kv, 0.0, 4, True),
    "csp": (vlc.CSP(0.5, window=4, cross=0.4), partial(newer.csp, window=4, cross=0.4), 4, 0, False),
    "critical_kv": (
        vlc.CriticalKV(0.5, window=4, pool=3),
        partial(
            newer.critical_kv,
            output=OUTPUT, votes=partial(reference.snap_kv, window=4, size=3), window=4,
        ), 4, 0, False,
    ),
    "kv_zip": (vlc.KVzip(0.3, sinks=2), partial(newer.kv_zip, sinks=2), 0.0, 2, False),
    "sparse_mm": (
        vlc.SparseMM(0.5, scores=HEAD_SCORES, window=4, pool=3),
        partial(newer.sparse_mm, scores=HEAD_SCORES, window=4, size=3, part=0.1), 4, 0, False,
    ),
    "lag_kv": (vlc.LagKV(0.6, sinks=2, lag=5), partial(newer.lag_kv, sinks=2, lag=5), 0.0, 2, False),
    "compactor": (
        vlc.Compactor(0.4, sketch=3, chunk=7, sinks=3, recent=2),
        partial(newer.compactor, rotation=rotation, sketch=3, chunk=7, sinks=3, recent=2), 2, 3, False,
    ),
    "key_norm": (vlc.KeyNorm(0.3), reference.key_norm, 0.1, 0, False),
    "key_difference": (vlc.KeyDifference(0.3), reference.key_difference, 0.1, 0, False),
}  # fmt: skip


def prompt_of(batch, params, row):
    n = int(batch.lengths[row])
    cut = {name: np.asarray(x[:, row, :n], np.float64) for name, x in params.items()}
    return reference.Prompt(**cut, index=batch.vision_index[row, :n])


def total_of(policy, n):
    if isinstance(policy.budget, vlc.Tokens):
        return LAYERS * min(policy.budget.count, n)
    part = policy.budget.cap if isinstance(policy.budget, vlc.Mass) else policy.budget
    return max(LAYERS, math.floor(Fraction(str(part)) * LAYERS * n))


def check(policy, method, window, sinks, text_first, seed):
    batch = stub_batch(seed=seed)
    params = stub_params(batch, seed)
    _, state = vlc.prefill(StubModel(), params, batch, policy).start(4)
    kept = kept_sets(state)
    window = Fraction(str(window)) if isinstance(window, float) else window
    budgets = []
    for row in range(batch.size):
        prompt = prompt_of(batch, params, row)
        total = total_of(policy, prompt.n)
        slots, scores = method(prompt, total)
        latest = window(prompt, total) if callable(window) else window
        np.testing.assert_array_equal(state.allocation.requested[row], slots)
        budgets.append(slots)
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                kind = ~prompt.visual if text_first else None
                count = slots[layer][head] if isinstance(slots[layer], list) else slots[layer]
                wanted = reference.keep(scores[layer, head], count, latest, sinks, kind)
                assert kept[layer][row][head] == wanted, (row, layer, head)
    return budgets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kept_sets_equal_the_definition(case):
    for seed in range(3):  # of the same shape: one compilation
        check(*case, seed)


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9])
def test_sinks_take_no_part_in_expected_attention(mass):
    """As larger models have them: sinks to which most of what one head of a group attends to goes."""
    batch, sinks, future = stub_batch(seed=5), 4, 20
    params = {name: np.array(x, np.float64) for name, x in stub_params(batch, 5).items()}
    group = params["query"].shape[3] // KV_HEADS
    for row, layer, head in np.ndindex(batch.size, LAYERS, KV_HEADS):
        n = int(batch.lengths[row])
        if n <= sinks:
            continue
        mean, spread = reference.coming_queries(
            prompt_of(batch, params, row), layer, head * group, rotation, sinks, future
        )
        rest = reference.expected_logits(params["key"][layer, row, sinks:n, head], mean, spread)
        wanted = np.log(np.exp(rest).sum() * mass / (1 - mass) / sinks)
        small, large = 0.0, 100.0
        for _ in range(60):  # a key along the mean query, as long as it takes
            middle = (small + large) / 2
            logit = reference.expected_logits(middle * mean[None] / np.linalg.norm(mean), mean, spread)[0]
            small, large = (middle, large) if logit < wanted else (small, middle)
        params["key"][layer, row, :sinks, head] = small * mean / np.linalg.norm(mean)
    params = {name: x.astype(np.float32) for name, x in params.items()}
    policy = vlc.ExpectedAttention(0.5, future=future)
    kept, differ = kept_sets(vlc.prefill(StubModel(), params, batch, policy).start(4)[1]), 0
    for row in range(batch.size):
        prompt = prompt_of(batch, params, row)
        slots, scores = reference.expected_attention(prompt, total_of(policy, prompt.n), rotation, sinks, future)
        _, others = reference.expected_attention(prompt, 3, rotation, sinks, future, over_sinks=True)
        for layer, head in np.ndindex(LAYERS, KV_HEADS):
            assert kept[layer][row][head] == reference.keep(scores[layer, head], slots[layer], 0, sinks)
            differ += kept[layer][row][head] != reference.keep(others[layer, head], slots[layer], 0, sinks)
    assert differ > 0, "a softmax over the sinks as well would keep the same"


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
def test_vl_cache_by_the_rule_of_effivlm_bench(budget):
    policy = vlc.VLCache(budget, total="effivlm")
    totals = []
    for seed in range(3):
        batch = stub_batch(seed=seed)
        params = stub_params(batch, seed)
        state = vlc.prefill(StubModel(), params, batch, policy).start(4)[1]
        kept = kept_sets(state)
        for row in range(batch.size):
            prompt = prompt_of(batch, params, row)
            window, slots = reference.effivlm(prompt, budget)
            assert state.allocation.requested[row].tolist() == slots
            scores = prompt.received(prompt.question())
            for layer, head in np.ndindex(LAYERS, KV_HEADS):
                assert kept[layer][row][head] == reference.keep(scores[layer, head], slots[layer], window)
            totals.append(sum(slots) / LAYERS / prompt.n)
    assert np.ptp(totals) > 0.01, "it is not a budget that is met"


def test_the_cases_are_not_all_alike():
    """What the tests above would miss if the stub were too tame; references only."""
    batch = stub_batch()
    prompts = [prompt_of(batch, stub_params(batch), row) for row in range(batch.size)]
    for name in ("pyramid_kv", "prefix_kv", "air_cache", "vl_cache_tokens"):
        policy, method, *_ = CASES[name]
        budgets = [method(prompt, total_of(policy, prompt.n))[0] for prompt in prompts]
        assert any(max(slots) > min(slots) + 1 for slots in budgets), f"{name} gives every layer the same"
    for name in ("ada_kv", "ada_kv_pyramid"):
        policy, method, *_ = CASES[name]
        slots = np.concatenate([method(prompt, total_of(policy, prompt.n))[0] for prompt in prompts])
        assert np.any(abs(slots[:, 0] - slots[:, 1]) > 1), f"{name} gives every head the same"
    for name in ("snap_kv_mass", "vl_cache_mass", "prefix_kv_mass", "look_m_mass"):
        policy, method, *_ = CASES[name]
        totals = [total_of(policy, prompt.n) for prompt in prompts]
        bound = [sum(method(prompt, total)[0]) == total for prompt, total in zip(prompts, totals)]
        assert any(bound) != all(bound) or name == "prefix_kv_mass", f"{name}: {bound}"
    masked, plain = (
        [change(prompt, prompt.received(prompt.question())) for prompt in prompts]
        for change in (reference.mask_sinks, lambda prompt, scores: scores)
    )
    assert any(np.any(a != b) for a, b in zip(masked, plain)), "no visual sinks"


def test_a_window_in_tokens_is_not_pooled():
    policy = vlc.SnapKV(window=7)
    assert policy.score == SequencePooled(AccumulatedAttention(), 5, "mean", skip=7)
    assert vlc.SnapKV(window=7, recent=0.1).score.skip == 0
    assert vlc.SnapKV(pool=1).score == AccumulatedAttention()
