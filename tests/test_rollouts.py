"""Rollouts: what each sampled token's three log-probabilities are, importance weights, and the loss of GRPO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference.next_token import filtered_logits
from vlcache_jax.training.parts import split
from vlcache_jax.training.rollouts import Group, advantages, grpo_loss, log_probabilities, rollout
from vlcache_jax.training.state import init_state, make_train_step

pytestmark = pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PolicyWarning")
ROWS, SAMPLES, NEW = 2, 3, 4
POLICY = vlc.SnapKV(budget=0.4, window=4)


@pytest.fixture(scope="module")
def tiny():
    model, params = tiny_llava(layers=2)
    return model, jax.tree.map(jnp.asarray, params), ragged_batch(rows=ROWS, length=24, tiles=1)


@pytest.fixture(scope="module")
def drawn(tiny):
    """Rollouts drawn at another temperature with a filter, inside one program."""
    draw = jax.jit(
        lambda params, batch: rollout(
            tiny[0], params, batch, POLICY, NEW, samples=SAMPLES, sampling=vlc.Sampling(temperature=0.8, top_k=9),
            seeds=5, full=True,
        )
    )  # fmt: skip
    return draw(*tiny[1:])


def test_three_numbers_of_every_token(tiny, drawn):
    """`raw` and `sampled` by single steps of the compressed cache, `full` by `forward` over prompt and answer."""
    model, params, batch = tiny
    out = drawn
    assert out.tokens.shape == out.raw.shape == (ROWS, SAMPLES, NEW)
    whole = vlc.answer(
        vlc.compress(model, params, batch, POLICY), max_new_tokens=NEW, samples=SAMPLES,
        sampling=vlc.Sampling(temperature=0.8, top_k=9), seeds=5,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, whole.tokens)
    logits, state = vlc.prefill(model, params, batch, POLICY).start(NEW, rows=ROWS * SAMPLES)
    counts, flat = np.asarray(out.counts).reshape(-1, NEW), np.asarray(out.tokens).reshape(-1, NEW)
    options = [jnp.full(len(flat), x) for x in (jnp.float32(0.8), jnp.int32(9), jnp.float32(1))]
    for t in range(NEW):
        for name, of in (("raw", logits), ("sampled", filtered_logits(logits, *options))):
            wanted = np.asarray(jax.nn.log_softmax(of))[np.arange(len(flat)), flat[:, t]]
            found = np.asarray(getattr(out, name)).reshape(-1, NEW)[:, t]
            np.testing.assert_allclose(found, np.where(counts[:, t], wanted, 0), atol=2e-5)
        logits, state = vlc.decode_step(model, params, jnp.asarray(flat[:, t]), state)
    forward = jax.jit(lambda batch: model.apply({"params": params}, batch, method="forward"))
    for row, sample in np.ndindex(ROWS, SAMPLES):
        n, length = int(out.lengths[row, sample]), int(batch.lengths[row])
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : length + n] = [*batch.tokens[row, :length], *np.asarray(out.tokens)[row, sample, :n]]
        index = np.full((1, 32), -1, np.int32)
        index[0, :length] = batch.vision_index[row, :length]
        one = vlc.Batch(tokens, np.array([length + n], np.int32), index, batch.pixels[row : row + 1])
        every = jax.nn.log_softmax(forward(one)[0])
        wanted = np.asarray(every)[length - 1 + np.arange(n), tokens[0, length : length + n]]
        np.testing.assert_allclose(out.full[row, sample, :n], wanted, atol=2e-5)
    assert np.abs(np.where(out.counts, out.full - out.raw, 0)).max() > 0.01  # the compressed cache is another policy


def test_importance_weights_give_the_full_caches_expectation(tiny, drawn):
    """Over all tokens of the next place: sum of p_sampled * weight * f = sum of p_full * f."""
    model, params, batch = tiny
    every = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32)[None, :, None], (ROWS, 64, 1))
    given = vlc.Continuation(every, jnp.ones((ROWS, 64), jnp.int32))
    kept = vlc.score(vlc.compress(model, params, batch, POLICY), given).log_probabilities[..., 0]
    full = log_probabilities(model, params, batch, given)[..., 0]
    np.testing.assert_allclose(jnp.sum(jnp.exp(kept), 1), 1, rtol=1e-5)
    f = jnp.sin(jnp.arange(64.0))[None]
    weighted = jnp.sum(jnp.exp(kept) * jnp.exp(full - kept) * f, 1)
    np.testing.assert_allclose(weighted, jnp.sum(jnp.exp(full) * f, 1), atol=1e-5)


def test_the_gradient_is_that_of_weighted_log_probabilities(tiny, drawn):
    """At the parameters that drew: sum of advantage * min(exp(full - sampled), most) * d log p, over all tokens."""
    model, params, batch = tiny
    group = Group(batch, drawn, advantages([[1, 0, 0], [0, 1, 1]]))
    found = jax.jit(jax.grad(lambda p: grpo_loss(model, correction=1.5)(p, group)[0]))(params)
    mismatch = np.asarray(drawn.full) - np.asarray(drawn.sampled)
    weights = np.minimum(np.exp(mismatch), 1.5) * np.asarray(drawn.counts, np.float32)
    weights = weights * group.advantages[..., None] / float(np.sum(drawn.counts))

    def by_hand(p):
        return -jnp.sum(weights * log_probabilities(model, p, batch, drawn))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, jax.jit(jax.grad(by_hand))(params))


def test_clipping_and_no_correction(tiny, drawn):
    """Without a correction the weight is 1; a token that moved too far in its direction has no gradient."""
    model, params, batch = tiny
    moved = dataclasses.replace(drawn, full=drawn.full - 1.0)  # ratios of e
    ups = Group(batch, moved, np.ones((ROWS, SAMPLES), np.float32))
    value, metrics = grpo_loss(model, correction=None)(params, ups)
    assert float(value) == pytest.approx(-1.2, rel=1e-4)
    assert float(metrics["ratio"]) == pytest.approx(np.e, rel=1e-3)
    assert float(metrics["weight"]) == float(np.sum(drawn.counts))
    downs = dataclasses.replace(ups, advantages=-ups.advantages)
    assert float(grpo_loss(model, correction=None)(params, downs)[0]) == pytest.approx(np.e, rel=1e-3)


def test_steps_make_rewarded_tokens_likelier(tiny):
    """Reward: the share of an answer's tokens that are even. No log-probabilities of the full cache are kept."""
    model, params, batch = tiny
    tuned, frozen = split(jax.tree.map(lambda x: x + 0, params), ("decoder",))
    optimizer = optax.adam(3e-3)
    step, state = make_train_step(grpo_loss(model), optimizer), init_state(tuned, optimizer)
    rewards = []
    for number in range(25):
        out = rollout(model, frozen | state.params, batch, POLICY, NEW, samples=8, seeds=100 * number, eos_token_ids=[])
        reward = np.mean(np.asarray(out.tokens) % 2 == 0, axis=-1)
        rewards.append(reward.mean())
        state, metrics = step(state, Group(batch, out, advantages(reward)), frozen)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15, rewards
    assert float(metrics["ratio"]) == pytest.approx(1)


def test_rules_that_rewrite_the_cache(tiny):
    """What it kept for the next token is gone afterwards: the numbers are those of the moment."""
    out = rollout(*tiny, vlc.H2O(budget=0.4, decoding="evict"), NEW, samples=2, full=True)
    assert np.all(np.where(out.counts, np.isfinite(out.full) & (out.raw < 0), out.raw == 0))
