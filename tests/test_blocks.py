"""Images whose tokens see each other: Gemma 3's decoder in prefill, scores and decoding, windows included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_decoders import gemma3, gemma3_with_images
from text_model import TextModel, by_definition, text_batch

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.kernels.attention import Mask, attention

WINDOW, LENGTH, NEW, SIDE = 7, 40, 5, 3
LENGTHS = [40, 12, 30, 23]  # all but the first end in an image, one of them after four of its tokens
IMAGES = ((3, 9), (14, 9), (26, 9))


@pytest.fixture(scope="module")
def tiny():
    _, config, params = gemma3(window=WINDOW)
    return TextModel(config, side=SIDE, blocks=True), {"decoder": params}


def prompts():
    return text_batch(LENGTHS, LENGTH, images=IMAGES)


def last(logits):
    return np.take_along_axis(np.asarray(logits), np.asarray(LENGTHS)[:, None, None] - 1, axis=1)[:, 0]


@pytest.mark.parametrize("window", [WINDOW, 100])
def test_forward_is_that_of_transformers(window):
    """At every position, by the types of tokens; images longer than the window, and shorter."""
    reference, config, params = gemma3_with_images(window)
    batch = prompts()
    model = TextModel(config, side=SIDE, blocks=True)
    kinds = torch.from_numpy(np.asarray(batch.vision_index >= 0)).long()
    with torch.no_grad():
        expected = reference(torch.from_numpy(batch.tokens).long(), token_type_ids=kinds).logits.numpy()
    found = model.apply({"params": {"decoder": params}}, batch, method="forward")
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(found[row, :n], expected[row, :n], atol=1e-4, rtol=0)
    causal = TextModel(config).apply({"params": {"decoder": params}}, batch, method="forward")
    assert np.abs(np.asarray(causal - found)[:, 4:12]).max() > 1e-2


POLICIES = {
    "full": vlc.FullCache(),
    "8 bits": vlc.FullCache(bits=8),
    "post vision": vlc.VLCache(budget=0.4),
    "a window of rows": vlc.SnapKV(budget=0.4, window=8),
    "all rows": vlc.H2O(budget=0.4, normalised=True),
    "rows of its own": vlc.AirCache(budget=0.4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_prefill_says_what_the_model_says(tiny, name):
    model, params = tiny
    batch, policy = prompts(), POLICIES[name]
    expected = last(model.apply({"params": params}, batch, method="forward"))
    np.testing.assert_allclose(vlc.prefill(model, params, batch, policy).logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "post vision", "all rows"])
def test_decoding_equals_the_full_model_with_the_rest_masked_out(tiny, name):
    model, params = tiny
    batch = prompts()
    logits, state = vlc.prefill(model, params, batch, POLICIES[name]).start(NEW)
    first, new, found = state, np.random.default_rng(0).integers(3, 64, (NEW, 4)).astype(np.int32), []
    for tokens in new:
        logits, state = vlc.decode_step(model, params, tokens, state)
        found.append(np.asarray(logits))
    kept = {layer: np.asarray(first.kept_positions(layer)) for layer in model.spec.full_layers}
    np.testing.assert_allclose(np.stack(found), by_definition(model, params, batch, new, kept), atol=1e-4, rtol=0)


def maps(model, params, batch):
    """(float64 attention [layers, batch, heads, length, length], bool [batch, length, length] of who sees whom)."""
    embedded = model.apply({"params": params}, batch, method="embed")
    mask = Mask(blocks=embedded.blocks)

    def attend(query, key, value, carry, _):
        return attention(query, key, value, mask, implementation="reference")[0], carry, (query, key)

    run = model.apply({"params": params}, embedded.hidden, embedded.positions, attend, method="decode")
    query, key = (np.asarray(x, np.float64) for x in run[2])
    key = np.repeat(key, query.shape[3] // key.shape[3], axis=3)
    logits = np.einsum("lbthd,lbshd->lbhts", query, key) / query.shape[4] ** 0.5
    seen = np.asarray(mask.as_array(batch.length))
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), seen


@pytest.fixture(scope="module")
def full_layers():
    """Without windows, so that every layer is scored."""
    _, config, params = gemma3(window=WINDOW, layers=3)
    config = dataclasses.replace(config, windows=(), window_rope=None)
    return TextModel(config, side=SIDE, blocks=True), {"decoder": params}


@pytest.mark.parametrize("normalised", [False, True])
def test_scores_of_rows_within_images(full_layers, normalised):
    """H2O's, from all rows: what a token receives from later tokens of its image counts, and from earlier ones."""
    model, params = full_layers
    batch = prompts()
    state = vlc.prefill(model, params, batch, vlc.H2O(budget=0.4, recent=0.1, normalised=normalised)).start(1)[1]
    weights, seen = maps(model, params, batch)
    for row, n in enumerate(LENGTHS):
        slots, recent = int(0.4 * 3 * n) // 3, int(0.1 * (int(0.4 * 3 * n) // 3))
        for layer, head in np.ndindex(3, 2):
            scores = weights[layer, row, 2 * head : 2 * head + 2, :n, :n].sum(axis=1).mean(axis=0)
            if normalised:
                scores = scores / seen[row, :n, :n].sum(axis=0)
            kept = np.asarray(state.kept_positions(layer)[row, head])
            kept = set(kept[kept >= 0].tolist())
            assert slots <= len(kept) <= slots + 1
            latest = set(range(n - max(1, recent), n)) & kept
            order = [j for j in np.argsort(-scores, kind="stable") if j not in latest]
            assert kept == latest | set(order[: len(kept) - len(latest)])


def test_density_counts_what_the_rows_see(full_layers):
    """VL-Cache's, of a prompt that ends in an image, whose rows see tokens after them."""
    model, params = full_layers
    batch = prompts()
    density = vlc.prefill(model, params, batch, vlc.VLCache(budget=0.4)).allocation.density
    weights, seen = maps(model, params, batch)
    for row, (n, first) in enumerate(zip(LENGTHS, (35, 0, 0, 0))):
        rows = slice(first, n)
        part, mask = weights[:, row, :, rows, :n], seen[row, rows, :n]
        large = (part >= 0.01 * part.max(axis=-1, keepdims=True)) & mask
        expected = large.sum(axis=(2, 3)).mean(axis=1) / mask.sum()
        np.testing.assert_allclose(density[row], expected, rtol=1e-3)


def test_a_row_is_what_it_is_alone(tiny):
    model, params = tiny
    batch, policy = prompts(), vlc.VLCache(budget=0.4)
    out = vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[])
    for row in (1, 3):
        single = jax.tree.map(lambda x: np.asarray(x)[row : row + 1], batch)  # noqa: B023
        alone = vlc.generate(model, params, single, policy, NEW, eos_token_ids=[])
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])


def test_text_behind_a_prompt_is_causal(tiny):
    """A question appended to a context: as if it had been part of the prompt."""
    model, params = tiny
    batch = prompts()
    more = np.random.default_rng(1).integers(3, 64, (4, 4)).astype(np.int32)
    asked = vlc.extend(vlc.compress(model, params, batch), vlc.Continuation(more, np.full(4, 4, np.int32)))
    room = [(0, 0), (0, 4)]
    tokens, index = np.pad(batch.tokens, room), np.pad(batch.vision_index, room, constant_values=TEXT)
    for row, n in enumerate(LENGTHS):
        tokens[row, n : n + 4] = more[row]
    whole = dataclasses.replace(batch, tokens=tokens, vision_index=index, lengths=batch.lengths + 4)
    np.testing.assert_allclose(asked.logits, vlc.compress(model, params, whole).logits, atol=1e-4)


def test_gradients_of_a_loss_are_finite_and_know_the_images(tiny):
    model, params = tiny
    batch = prompts()

    def loss(params, model):
        logits = model.apply({"params": params}, batch, method="forward")
        return jnp.mean(jax.nn.logsumexp(logits[:, 4:12], axis=-1))

    mine, other = (jax.jit(jax.grad(loss), static_argnums=1)(params, m) for m in (model, TextModel(model.config)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mine))
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other))) > 1e-3
