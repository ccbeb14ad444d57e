"""Positions belong to the model: three axes, an answer that goes on elsewhere than behind the number of tokens, and
what single layers add."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_model import by_definition
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.decoder.config import RopeConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.typing import Embedded

SIDE, NEW = 4, 6  # patches of a tile's side


class Grid(Llava):
    """A LLaVA whose images lie at one time, in rows and columns, as Qwen2-VL's do; text goes on behind the largest."""

    def embed(self, batch, position_ids=None):
        embedded = super().embed(batch, position_ids)
        index = jnp.asarray(batch.vision_index)
        visual, patch = index != TEXT, jnp.maximum(index, 0) % SIDE**2
        # A token of text is one position behind the one before; an image takes SIDE of them as a whole.
        first = visual & ~jnp.pad(visual, [(0, 0), (1, 0)])[:, :-1]
        start = jnp.cumsum(jnp.where(visual, SIDE * first.astype(jnp.int32), 1), axis=1) - jnp.where(visual, SIDE, 1)
        where = jnp.stack([jnp.zeros_like(patch), patch // SIDE, patch % SIDE], axis=1)
        positions = start[:, None] + jnp.where(visual[:, None], where, 0)
        inside = jax.lax.iota(jnp.int32, batch.length)[None] < embedded.next_position[:, None]
        end = jnp.max(jnp.where(inside[:, None], positions, -1), axis=(1, 2)) + 1
        return Embedded(embedded.hidden, jnp.minimum(positions, end[:, None, None] - 1), end)


class Deep(Llava):
    """Adds its embeddings behind the first two layers again."""

    def embed(self, batch, position_ids=None):
        embedded = super().embed(batch, position_ids)
        return dataclasses.replace(embedded, layer_inputs=jnp.stack([0.5 * embedded.hidden, -embedded.hidden]))


def grid():
    plain, params = tiny_llava(layers=3, rope=RopeConfig(sections=(1, 1, 2)))
    return Grid(plain.config), params, ragged_batch()


@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(budget=0.4)], ids=str)
def test_decoding_after_eviction_equals_the_masked_full_cache(policy):
    model, params, batch = grid()
    logits, state = vlc.prefill(model, params, batch, policy).start(NEW)
    np.testing.assert_array_equal(state.next_index, batch.lengths)
    behind = np.asarray(state.next_index - state.next_position)
    assert (behind[:2] > 3).all()
    assert behind[2] == 0  # text only
    steps, new = [], np.random.default_rng(0).integers(6, 64, (NEW, batch.size)).astype(np.int32)
    context = state
    for tokens in new:
        logits, state = vlc.decode_step(model, params, tokens, state)
        steps.append(np.asarray(logits))
    np.testing.assert_array_equal(state.next_index, batch.lengths + NEW)
    np.testing.assert_array_equal(np.asarray(state.next_index - state.next_position), behind)
    kept = [np.asarray(context.kept_positions(layer)) for layer in range(model.spec.num_layers)]
    np.testing.assert_allclose(np.stack(steps), by_definition(model, params, batch, new, kept), atol=2e-4)


def test_a_prompt_says_what_the_model_says():
    model, params, batch = grid()
    expected = jax.jit(partial(model.apply, method="forward"))({"params": params}, batch)
    last = np.take_along_axis(np.asarray(expected), batch.lengths[:, None, None] - 1, axis=1)[:, 0]
    np.testing.assert_allclose(vlc.prefill(model, params, batch).logits, last, atol=1e-5)
    plain = Llava(model.config)
    assert np.abs(np.asarray(vlc.prefill(plain, params, batch).logits) - last)[:2].max() > 1e-3


@pytest.mark.parametrize("rule", [vlc.Evict(recent=vlc.Tokens(4), sinks=1), vlc.Recompress(4, recent=0.2)], ids=str)
def test_rules_count_tokens(rule):
    """Windows and the answer's own tokens go by the number of tokens, whatever their rotary positions are."""
    model, params, batch = grid()
    policy = vlc.H2O(budget=vlc.Tokens(12), decoding=rule) if isinstance(rule, vlc.Evict) else None
    policy = policy or vlc.VLCache(budget=0.4, decoding=rule)
    state = vlc.prefill(model, params, batch, policy).start(NEW)[1]
    for _ in range(NEW):
        _, state = vlc.decode_step(model, params, np.full(batch.size, 9, np.int32), state)
    positions = np.asarray(state.kept_positions(0))
    taken = NEW if isinstance(rule, vlc.Evict) else 4
    for row, n in enumerate(batch.lengths):
        newest = positions[row].max(axis=-1)
        assert (newest == n + taken - 1).all(), (row, newest)


def test_contexts_keep_both(tmp_path):
    model, params, batch = grid()
    ctx = vlc.compress(model, params, batch, vlc.KeyDifference(budget=0.5))
    vlc.save_context(ctx, tmp_path / "ctx.safetensors")
    again = vlc.load_context(tmp_path / "ctx.safetensors", model, params)
    for name in ("next_position", "next_index"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ctx, name))
    more = vlc.Continuation(np.full((batch.size, 3), 9, np.int32), np.full((batch.size,), 3, np.int32))
    asked = vlc.extend(again, more)
    np.testing.assert_array_equal(asked.next_position, ctx.next_position + 3)
    np.testing.assert_array_equal(asked.next_index, batch.lengths + 3)
    state = vlc.compress(model, params, batch, vlc.KeyDifference(budget=0.5)).start(3)[1]
    for tokens in more.tokens.T:
        logits, state = vlc.decode_step(model, params, tokens, state)
    np.testing.assert_allclose(asked.logits, logits, atol=1e-4)


def test_what_single_layers_add():
    plain, params = tiny_llava(layers=3)
    model, batch = Deep(plain.config), ragged_batch()
    added, without = (m.apply({"params": params}, batch, method="forward") for m in (model, plain))
    assert np.abs(np.asarray(added - without)).max() > 1e-3
    last = np.take_along_axis(np.asarray(added), batch.lengths[:, None, None] - 1, axis=1)[:, 0]
    for policy in (vlc.FullCache(), vlc.VLCache(budget=0.5)):
        np.testing.assert_allclose(vlc.prefill(model, params, batch, policy).logits, last, atol=1e-5)

    def attend(query, key, value, carry, xs):
        return jnp.zeros_like(query), carry, None

    def run(count, more):
        config = dataclasses.replace(plain.config.decoder, num_layers=count)
        of = {**params["decoder"], "layers": jax.tree.map(lambda x: x[-count:], params["decoder"]["layers"])}
        cut = Llava(dataclasses.replace(plain.config, decoder=config))
        hidden, positions = jnp.ones((1, 2, 32)), jnp.arange(2)[None]
        variables = {"params": params | {"decoder": of}}
        return cut.apply(variables, hidden, positions, attend, layer_inputs=more, method="decode")[0]

    more = 0.1 * jnp.arange(64.0).reshape(1, 1, 2, 32)
    np.testing.assert_allclose(run(1, jnp.concatenate([more, more])[:1]), run(1, more))
    assert np.abs(run(2, more) - run(2, None)).max() > 1e-3
    np.testing.assert_allclose(run(2, jnp.concatenate([more, 0 * more])), run(2, more), atol=1e-6)


def test_a_state_can_be_donated():
    """No two of its arrays share a buffer."""
    model, params = tiny_llava()
    batch = jax.tree.map(jnp.asarray, ragged_batch())
    _, state = vlc.prefill(model, params, batch).start(2)
    step = jax.jit(lambda tokens, state: vlc.decode_step(model, params, tokens, state)[1], donate_argnums=1)
    after = step(jnp.full(batch.size, 9), state)
    np.testing.assert_array_equal(after.next_index, np.asarray(ragged_batch().lengths) + 1)
    np.testing.assert_array_equal(after.next_position, after.next_index)
