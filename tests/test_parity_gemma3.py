"""Layers of two kinds: Gemma 3's text decoder against transformers, beyond its window, images included."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_decoders import gemma3

from vlcache_jax.kernels.attention import Mask
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.decoder.layout import arranged
from vlcache_jax.parallel.ops import Kernels, attention, of_layer

LENGTH, NEW = 32, 8


def forward(config, blocks=None, dtype="float32", layout="stacked"):
    """Compiled: parameters, tokens -> logits of every position; and `init`, of the parameters."""

    def attend(query, key, value, carry, layer):
        def run(window, *qkv):
            return attention(Kernels(), *qkv, mask=Mask(window=window, blocks=blocks), with_lse=False)[0]

        return of_layer(config.windows, layer, run, query, key, value), carry, None

    decoder = Decoder(config, jnp.dtype(dtype), layout=layout)

    def logits(decoder, tokens):
        positions = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
        layers = jnp.arange(config.num_layers)
        return decoder.unembed(decoder(decoder.embed(tokens), positions, attend, None, layers)[0])

    def run(params, tokens):
        return jitted(params, tokens)

    jitted = jax.jit(lambda params, tokens: decoder.apply({"params": params}, tokens, method=logits))
    run.init = partial(decoder.init, method=logits)
    return run


def test_logits_and_greedy_tokens():
    reference, config, params = gemma3(final_logit_softcapping=5.0)
    tokens = np.random.default_rng(0).integers(3, 64, (2, LENGTH))
    run = forward(config)
    with torch.no_grad():
        answer = reference.generate(
            torch.from_numpy(tokens[:, :-NEW]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1
        ).numpy()
        expected = reference(torch.from_numpy(answer)).logits.numpy()
    logits = np.asarray(run(params, answer))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1
    np.testing.assert_array_equal(logits[:, -NEW - 1 : -1].argmax(-1), answer[:, -NEW:])
    for change in (
        {"windows": (None,) * 7}, {"window_rope": None}, {"qk_norm": False}, {"logit_cap": None}, {"query_scale": None},
    ):  # fmt: skip
        other = forward(dataclasses.replace(config, **change))(params, answer)
        assert np.abs(other - logits)[:, -1].max() > 1e-2, change


@pytest.mark.parametrize("window", [5, 100])
def test_tokens_of_an_image_see_each_other(window):
    from transformers import Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

    assert Gemma3Config
    reference, config, params = gemma3(window=window, layers=3)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 64, (2, LENGTH))
    blocks = np.full((2, LENGTH), -1, np.int32)
    blocks[0, 3:12], blocks[0, 14:23], blocks[1, 20:29] = 0, 1, 0
    with torch.no_grad():
        embedded = reference.model.embed_tokens(torch.from_numpy(tokens))
        masks = create_masks_for_vision_model(
            reference.config, embedded, None, None, None, torch.from_numpy(blocks).long()
        )
        hidden = reference.model(inputs_embeds=embedded, attention_mask=masks).last_hidden_state
        expected = reference.lm_head(hidden).numpy()
    logits = forward(config, jnp.asarray(blocks))(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(forward(config)(params, tokens) - logits).max() > 1e-2


def test_layers_apart_are_the_same():
    _, config, params = gemma3(layers=3)
    tokens = np.random.default_rng(2).integers(3, 64, (1, LENGTH))
    laid = forward(config, layout="apart")
    shapes = jax.eval_shape(lambda: laid.init(jax.random.key(0), tokens))["params"]
    other = arranged({"decoder": params}, {"decoder": shapes}, tied=True)["decoder"]
    np.testing.assert_allclose(forward(config)(params, tokens), laid(other, tokens), atol=1e-5)


def test_embeddings_are_scaled_in_the_dtype_of_the_computation():
    _, config, params = gemma3(layers=1)
    decoder = Decoder(config, jnp.bfloat16)
    found = decoder.apply({"params": params}, jnp.arange(64)[None], method="embed")[0]
    scale = jnp.asarray(32**0.5, jnp.bfloat16)  # 5.65625
    assert float(scale) != pytest.approx(32**0.5, abs=1e-4)
    np.testing.assert_array_equal(found, params["embed_tokens"]["embedding"].astype(jnp.bfloat16) * scale)


def test_windows_fit_the_layers():
    _, config, _ = gemma3(layers=3)
    with pytest.raises(ValueError, match="3 windows do not fit 4 layers"):
        dataclasses.replace(config, num_layers=4)
    with pytest.raises(ValueError, match="windows names none"):
        dataclasses.replace(config, windows=())
