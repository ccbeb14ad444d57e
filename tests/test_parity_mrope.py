"""Rotary positions on three axes: Qwen2-VL's text decoder against transformers, positions given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_decoders import qwen2_vl
from text_model import TextModel, by_definition, text_batch

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.kernels.attention import attention
from vlcache_jax.models.decoder import rope
from vlcache_jax.models.decoder.config import RopeConfig
from vlcache_jax.models.decoder.decoder import Decoder


def image_positions(parts):
    """i32 [3, length] of a prompt of texts (numbers of tokens) and images (rows, columns), as in Qwen2-VL."""
    found, start = [], 0
    for part in parts:
        if isinstance(part, int):
            found.append(np.tile(start + np.arange(part), (3, 1)))
            start += part
        else:
            row, column = (x.reshape(-1) for x in np.indices(part))
            found.append(start + np.stack([0 * row, row, column]))
            start += max(part)
    return np.concatenate(found, axis=1).astype(np.int32)


def causal(query, key, value, carry, xs):
    return attention(query, key, value, implementation="reference")[0], carry, None


def test_qwen2_vl_with_images():
    reference, head, config, params = qwen2_vl()
    prompts = [image_positions([3, (4, 6), 5, (2, 2), 4]), image_positions([2, (5, 5), 13])]
    positions = np.stack(prompts)
    assert positions.shape == (2, 3, 40)
    tokens = np.random.default_rng(0).integers(1, 64, (2, 40))

    @jax.jit
    def run(params, tokens, positions):
        decoder = Decoder(config)
        hidden = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, hidden, positions, causal)[0]
        return decoder.apply({"params": params}, hidden, method="unembed")

    with torch.no_grad():
        given = torch.from_numpy(positions).long().movedim(1, 0)
        expected = head(reference(input_ids=torch.from_numpy(tokens), position_ids=given).last_hidden_state).numpy()
    logits = run(params, jnp.asarray(tokens), jnp.asarray(positions))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1
    flat = run(params, jnp.asarray(tokens), jnp.tile(jnp.arange(40, dtype=jnp.int32), (2, 1)))
    assert np.abs(flat - logits).max() > 0.1  # the axes matter


@pytest.mark.parametrize("interleaved", [False, True])
def test_sections_equal_transformers(interleaved):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding

    sections = (24, 20, 20) if interleaved else (16, 24, 24)
    make, kind = (
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding) if interleaved else (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding)
    )
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    theirs = kind(make(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters))
    positions = np.random.default_rng(1).integers(0, 300, (2, 3, 9))
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions).movedim(1, 0))
    config = RopeConfig(theta=1e6, sections=sections, interleaved=interleaved)
    found = rope.rotation(jnp.asarray(positions), config, 128, 1024)
    np.testing.assert_allclose(found[0], cos[..., :64], atol=1e-4)
    np.testing.assert_allclose(found[1], sin[..., :64], atol=1e-4)


def test_text_is_at_the_same_position_on_all_axes():
    config, text = RopeConfig(sections=(2, 3, 3)), jnp.arange(7)[None]
    for flat, axes in zip(
        rope.rotation(text, config, 16, 64), rope.rotation(jnp.tile(text[:, None], (1, 3, 1)), config, 16, 64)
    ):
        np.testing.assert_array_equal(flat, axes)


def test_sections_that_do_not_fit_the_head():
    with pytest.raises(ValueError, match=r"rope sections \(2, 3, 3\) do not add up to 16, half of head_dim 32"):
        rope.rotation(jnp.zeros((1, 3, 1), jnp.int32), RopeConfig(sections=(2, 3, 3)), 32, 64)


SIDE, NEW = 3, 5
LENGTHS = [30, 12, 40, 11]
PARTS = ([3, (3, 3), 2, (3, 3), 7], [12], [20, (3, 3), 11], [2, (3, 3)])  # one is text alone, one ends in its image


def model_and_prompts():
    reference, head, config, params = qwen2_vl()
    index = np.full((4, 40), TEXT, np.int32)
    for row, (_, *parts) in enumerate(PARTS):
        at, image = PARTS[row][0], 0
        for part in parts:
            if isinstance(part, tuple):
                index[row, at : at + SIDE**2] = np.arange(SIDE**2) + image * SIDE**2
            at, image = (at + part, image) if isinstance(part, int) else (at + SIDE**2, image + 1)
    batch = dataclasses.replace(text_batch(LENGTHS, 40), vision_index=index)
    return reference, head, TextModel(config, side=SIDE, axes=True), {"decoder": params}, batch


def test_decoding_after_eviction_equals_the_full_cache_with_the_rest_masked_out():
    """New tokens go on at the model's own next position, which is below the number of tokens where there are images."""
    _, _, model, params, batch = model_and_prompts()
    positions = model.apply({"params": params}, batch, method="embed").positions
    for row, parts in enumerate(PARTS):
        np.testing.assert_array_equal(positions[row, :, : LENGTHS[row]], image_positions(parts))
    logits, state = vlc.prefill(model, params, batch, vlc.VLCache(budget=0.4)).start(NEW)
    np.testing.assert_array_equal(state.next_position, [18, 12, 34, 5])
    np.testing.assert_array_equal(state.next_index, LENGTHS)
    first, tokens, found = state, [jnp.argmax(logits, axis=-1)], []
    for _ in range(NEW - 1):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
        found.append(np.asarray(logits))
    new = np.asarray(tokens[:-1])
    kept = [np.asarray(first.kept_positions(layer)) for layer in range(3)]
    np.testing.assert_allclose(np.stack(found), by_definition(model, params, batch, new, kept), atol=1e-4, rtol=0)
    elsewhere = by_definition(model, params, batch, new, kept, shift=12)  # behind the number of tokens
    assert np.abs(np.stack(found) - elsewhere)[:, 0].max() > 1e-2


def test_answers_are_those_of_the_whole_sequence_run_again():
    """Uncompressed and greedy, against transformers' decoder on prompt and answer at once."""
    reference, head, model, params, batch = model_and_prompts()
    out = vlc.generate(model, params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    embedded = model.apply({"params": params}, batch, method="embed")
    for row, n in enumerate(LENGTHS):
        tokens = np.concatenate([batch.tokens[row, :n], np.asarray(out.tokens[row])])[None]
        after = np.tile(int(embedded.next_position[row]) + np.arange(NEW), (3, 1))
        positions = np.concatenate([embedded.positions[row, :, :n], after], axis=1)[:, None]
        with torch.no_grad():
            hidden = reference(
                input_ids=torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(positions).long()
            ).last_hidden_state
            expected = head(hidden)[0].argmax(-1).numpy()
        np.testing.assert_array_equal(out.tokens[row], expected[n - 1 : -1])
