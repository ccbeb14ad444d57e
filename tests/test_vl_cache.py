"""VL-Cache against its definition (docs/method.md), written here in plain numpy from attention maps."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_model import by_definition
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.kernels.attention import attention


def attention_maps(model, params, batch):
    """float64 [layers, batch, heads, length, length] from the queries and keys of a plain run of the model."""

    def attend(query, key, value, carry, layer):
        return attention(query, key, value, implementation="reference")[0], carry, (query, key)

    @jax.jit
    def run(variables, batch):
        hidden = model.apply(variables, batch, method="embed").hidden
        positions = jnp.broadcast_to(jnp.arange(batch.length), batch.tokens.shape)
        return model.apply(variables, hidden, positions, attend, method="decode")[2]

    query, key = (np.asarray(x, np.float64) for x in run({"params": params}, batch))
    key = np.repeat(key, query.shape[3] // key.shape[3], axis=3)
    logits = np.einsum("lbthd,lbshd->lbhts", query, key) / math.sqrt(query.shape[-1])
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def scoring_rows(n, visual):
    """P, for one row."""
    last = max((j for j in range(n) if visual[j]), default=-1)
    return range(last + 1, n) if -1 < last < n - 1 else range(n - min(n, 32), n)


def budgets(density, n, alpha):
    """Part 3 of docs/method.md, by bisection on the common factor of the weights."""
    layers = len(density)
    total = max(layers, math.floor(fractions.Fraction(str(alpha)) * layers * n))
    low = min(max(1, n // 100), total // layers)
    weight = np.asarray(density, np.float64) / np.sum(density)
    small, large = 0.0, 1e9
    for _ in range(200):
        middle = (small + large) / 2
        small, large = (middle, large) if np.clip(middle * weight, low, n).sum() < total else (small, middle)
    ideal = np.clip(large * weight, low, n)
    slots = np.floor(ideal + 1e-6).astype(int)
    held = (ideal <= low) | (ideal >= n)
    order = sorted(range(layers), key=lambda i: (slots[i] >= n, held[i], -(ideal[i] - slots[i]), i))
    for layer in order[: total - slots.sum()]:
        slots[layer] += 1
    return slots


def keep(score, n, slots, recent=0.1):
    """Ascending positions that a KV head keeps."""
    latest = max(1, math.floor(fractions.Fraction(str(recent)) * int(slots)))
    others = sorted(range(n - latest), key=lambda j: (-score[j], j))
    return sorted(others[: slots - latest] + list(range(n - latest, n)))


@pytest.mark.parametrize(
    ("heads", "budget", "seed", "candidate_fraction"),
    [("each", 0.1, 0, 1.0), ("shared", 0.35, 1, 1.0), ("each", 0.35, 3, 0.9), ("shared", 0.8, 2, 1.0)],
)
def test_kept_sets_equal_the_definition(heads, budget, seed, candidate_fraction):
    model, params = tiny_llava(heads=4, kv_heads=2)
    batch = ragged_batch(rows=4, length=64, seed=seed)
    policy = vlc.VLCache(budget=budget, heads=heads, candidate_fraction=candidate_fraction)
    _, state = vlc.prefill(model, params, batch, policy).start(4)
    maps = attention_maps(model, params, batch)
    for row in range(4):
        n = int(batch.lengths[row])
        rows = scoring_rows(n, batch.vision_index[row] != -1)
        chosen = maps[:, row][:, :, rows, :n]  # [layers, heads, rows, n]
        large = chosen >= 0.01 * chosen.max(axis=-1, keepdims=True)
        causal = np.arange(n) <= np.asarray(rows)[:, None]
        tau = len(rows)
        density = (large & causal).sum(axis=(2, 3)) / (tau * n - tau * (tau - 1) / 2)
        np.testing.assert_allclose(state.allocation.density[row], density.mean(axis=1), rtol=1e-5)
        slots = budgets(density.mean(axis=1), n, budget)
        np.testing.assert_array_equal(state.allocation.requested[row], slots)
        for layer in range(3):
            score = chosen[layer].sum(axis=1)  # [heads, n]
            kept = np.asarray(state.kept_positions(layer)[row])
            for kv_head in range(2):
                mine = score[2 * kv_head : 2 * kv_head + 2] if heads == "each" else score
                expected = keep(mine.mean(axis=0), n, slots[layer])
                assert kept[kv_head][kept[kv_head] >= 0].tolist() == expected


@pytest.mark.parametrize("budget", [0.1, *later(0.4)])
def test_compressed_decoding_equals_the_full_model_with_the_rest_masked_out(budget):
    """Promise 6 too: kept keys keep their rotary positions and new tokens go on at the original length."""
    model, params = tiny_llava()
    batch = ragged_batch(rows=4, length=64, seed=7)
    steps = 6
    logits, state = vlc.prefill(model, params, batch, vlc.VLCache(budget=budget)).start(steps)
    first = state
    tokens, found = [jnp.argmax(logits, axis=-1)], []
    for _ in range(steps):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
        found.append(np.asarray(logits))
    kept = [np.asarray(first.kept_positions(layer)) for layer in range(3)]
    expected = by_definition(model, params, batch, np.asarray(tokens[:steps]), kept)
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-4, rtol=0)


def test_the_uncompressed_cache_equals_the_full_forward():
    model, params = tiny_llava()
    batch = ragged_batch(rows=4)
    logits, _ = vlc.prefill(model, params, batch, vlc.FullCache()).start(4)
    whole = model.apply({"params": params}, batch, method="forward")
    last = np.asarray(whole)[np.arange(4), np.asarray(batch.lengths) - 1]
    np.testing.assert_allclose(logits, last, atol=1e-5)


def test_too_few_candidates_are_reported():
    model, params = tiny_llava()
    batch = ragged_batch(rows=4, length=64)
    policy = vlc.VLCache(budget=0.5, candidate_fraction=0.5)
    report = vlc.generate(model, params, batch, policy, 2).report
    wide = vlc.generate(model, params, batch, vlc.VLCache(budget=0.5), 2).report
    assert bool(jnp.all(wide.exact))
    half = np.asarray(batch.lengths)[:, None] // 2  # of the prompt itself, without its padding
    np.testing.assert_array_equal(report.exact, np.all(np.asarray(wide.kept) <= half, axis=1))
    np.testing.assert_array_equal(report.kept, np.minimum(wide.kept, half))


def test_llava_next_row_breaks_count_as_visual():
    batch = ragged_batch(rows=4, newline=True)
    alone = vlc.PostVision().span(jnp.asarray(batch.lengths), batch.vision_mask)
    for row in (0, 1):
        last = int(np.flatnonzero(np.asarray(batch.vision_index[row]) != -1)[-1])
        assert int(alone[0][row]) == last + 1
