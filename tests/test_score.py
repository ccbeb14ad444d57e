"""Log-probabilities of given answers, beside the whole model and beside steps of one token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_context import POLICY, QUESTIONS, ROWS, followed_by, questions
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference import divergence as divergence_module
from vlcache_jax.inference import score as score_module


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=ROWS)


@pytest.fixture(scope="module")
def ctx(llava, batch):
    return vlc.compress(*llava, batch, POLICY)


@pytest.mark.parametrize(("length", "at_once"), [(7, 2**28), (9, 4 * ROWS * QUESTIONS * 64 * 2)])
def test_with_the_full_cache_they_are_those_of_the_whole_model(llava, batch, length, at_once, monkeypatch):
    """Also where the logits of two tokens at a time are all that may exist."""
    model, params = llava
    monkeypatch.setattr(score_module, "_LOGITS", at_once)  # read while tracing
    answers = questions(length=length)
    found = vlc.score(vlc.compress(model, params, batch), answers)
    whole = followed_by(batch, answers)
    logits = np.asarray(model.apply({"params": params}, whole, method="forward"), np.float64)
    every = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    flat = np.asarray(found.log_probabilities).reshape(ROWS * QUESTIONS, -1)
    for row, n in enumerate(np.ravel(answers.lengths)):
        start = batch.lengths[row // QUESTIONS]
        wanted = [every[row, start - 1 + i, answers.tokens.reshape(len(flat), -1)[row, i]] for i in range(n)]
        np.testing.assert_allclose(flat[row, :n], wanted, atol=1e-5)
        assert not flat[row, n:].any()
        taken = [every[row, start - 1 + i].argmax() == answers.tokens.reshape(len(flat), -1)[row, i] for i in range(n)]
        assert found.greedy.reshape(len(flat), -1)[row].tolist() == taken + [True] * (length - n)
        np.testing.assert_allclose(np.ravel(found.total)[row], np.sum(wanted), rtol=1e-5)
        np.testing.assert_allclose(np.ravel(found.mean)[row], np.mean(wanted), rtol=1e-5)


def test_of_a_compressed_prompt_they_are_those_of_single_steps(llava, ctx):
    model, params = llava
    out = vlc.answer(ctx, max_new_tokens=5, sampling=vlc.Sampling(), eos_token_ids=[])
    found = jax.jit(vlc.score)(ctx, out)
    logits, state = ctx.start(5)
    for i in range(5):
        wanted = jax.nn.log_softmax(logits)[jnp.arange(ROWS), out.tokens[:, i]]
        np.testing.assert_allclose(found.log_probabilities[:, i], wanted, atol=1e-5)
        logits, state = vlc.decode_step(model, params, out.tokens[:, i], state)


def distribution(logits, sampling):
    """Log-probabilities f64 [vocab] after temperature, top-k and top-p, by sorting; 0 of whatever greedy takes."""
    if sampling is None:
        return np.zeros(len(logits))
    logits = np.asarray(logits, np.float64) / sampling.temperature
    order = np.argsort(-logits)
    kept = order[: sampling.top_k or len(order)]
    share = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    kept = kept[: int(np.searchsorted(np.cumsum(share), sampling.top_p or 1) + 1)]
    found = np.full(len(logits), -np.inf)
    found[kept] = logits[kept] - np.log(np.exp(logits[kept]).sum())
    return found


@pytest.mark.parametrize("policy", [vlc.FullCache(), POLICY])
def test_of_generated_tokens_they_are_those_of_one_pass_over_the_answer(llava, batch, policy):
    model, params = llava
    samplings = [vlc.Sampling(temperature=1.7, top_k=9, top_p=0.8), None]
    options = {"sampling": samplings, "seeds": 5, "eos_token_ids": []}
    plain = vlc.generate(model, params, batch, policy, 6, **options)
    out = vlc.generate(model, params, batch, policy, 6, log_probabilities=True, **options)
    assert plain.log_probabilities is None
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    ctx = vlc.compress(model, params, batch, policy)
    scores = vlc.score(ctx, out)
    np.testing.assert_allclose(out.log_probabilities, scores.log_probabilities, atol=1e-5)
    assert np.asarray(scores.greedy)[1].all()
    logits, state = ctx.start(6)
    for i in range(6):
        wanted = [distribution(logits[row], samplings[row])[out.tokens[row, i]] for row in range(ROWS)]
        np.testing.assert_allclose(out.sampling_log_probabilities[:, i], wanted, atol=1e-5)
        logits, state = vlc.decode_step(model, params, out.tokens[:, i], state)


def test_behind_the_end_of_an_answer_there_are_none(ctx):
    free = vlc.answer(
        ctx, max_new_tokens=6, samples=2, sampling=vlc.Sampling(), eos_token_ids=[], log_probabilities=True
    )
    out = vlc.answer(
        ctx, max_new_tokens=6, samples=2, sampling=vlc.Sampling(), eos_token_ids=[int(free.tokens[0, 1, 2])],
        log_probabilities=True,
    )  # fmt: skip
    inside = np.arange(6) < np.asarray(out.lengths)[..., None]
    assert not inside.all()
    np.testing.assert_array_equal(out.log_probabilities, np.where(inside, free.log_probabilities, 0))
    np.testing.assert_array_equal(out.sampling_log_probabilities, np.where(inside, free.sampling_log_probabilities, 0))


def test_several_answers_are_scored_as_if_alone(ctx):
    answers = questions()
    found = vlc.score(ctx, answers)
    assert found.total.shape == (ROWS, QUESTIONS)
    for i in range(QUESTIONS):
        alone = vlc.score(ctx, vlc.Continuation(answers.tokens[:, i], answers.lengths[:, i]))
        np.testing.assert_allclose(found.log_probabilities[:, i], alone.log_probabilities, atol=1e-6)


def test_what_cannot_be_scored_is_refused(llava, batch, ctx):
    with pytest.raises(vlc.InputError, match="3 questions cannot be shared out to the context's 2 rows"):
        vlc.score(ctx, questions(rows=1, each=3))
    rewriting = vlc.compress(*llava, batch, vlc.VLCache(0.4, decoding=vlc.Recompress()))
    with pytest.raises(vlc.PolicyError, match="rewrites what was kept"):
        vlc.score(rewriting, questions())
    with pytest.raises(vlc.NonFiniteError):
        vlc.score(dataclasses.replace(ctx, logits=ctx.logits * jnp.nan), questions())


@pytest.mark.parametrize("at_once", [2**27, 4 * ROWS * QUESTIONS * 64 * 2])
def test_the_divergence_of_two_contexts_is_that_of_their_logits(llava, batch, ctx, at_once, monkeypatch):
    """Beside float64, from logits of single steps under the one and the whole model under the other."""
    model, params = llava
    monkeypatch.setattr(divergence_module, "_LOGITS", at_once)  # read while tracing
    answers = questions(length=7)
    found = vlc.divergence(vlc.compress(model, params, batch), ctx, answers)
    np.testing.assert_allclose(found.log_probabilities, vlc.score(ctx, answers).log_probabilities, atol=1e-5)
    whole = np.asarray(model.apply({"params": params}, followed_by(batch, answers), method="forward"), np.float64)
    tokens = np.asarray(answers.tokens).reshape(ROWS, QUESTIONS, -1)
    shares = np.zeros((ROWS, QUESTIONS))
    for question in range(QUESTIONS):
        logits, state = ctx.start(7)
        for i in range(7):
            for row in range(ROWS):
                flat, n = row * QUESTIONS + question, answers.lengths[row, question]
                if i >= n:
                    assert found.kl[row, question, i] == 0
                    continue
                p, q = (
                    np.exp(x - x.max()) / np.exp(x - x.max()).sum()
                    for x in (whole[flat, batch.lengths[row] - 1 + i], np.asarray(logits[row], np.float64))
                )
                np.testing.assert_allclose(found.kl[row, question, i], np.sum(p * np.log(p / q)), atol=1e-5)
                assert bool(found.same[row, question, i]) == (p.argmax() == q.argmax())
                shares[row, question] += (p.argmax() == q.argmax()) / n
            logits, state = vlc.decode_step(model, params, jnp.asarray(tokens[:, question, i]), state)
    np.testing.assert_allclose(found.agreement, shares, rtol=1e-6)
    np.testing.assert_allclose(found.mean, np.asarray(found.kl).sum(axis=-1) / np.asarray(answers.lengths), rtol=1e-6)
    assert float(jnp.max(found.kl)) > 1e-3


def test_contexts_that_do_not_belong_together(llava, ctx):
    with pytest.raises(vlc.InputError, match="contexts are of 1 rows, 64 tokens and 2 rows, 64 tokens"):
        vlc.divergence(vlc.compress(*llava, ragged_batch(rows=1)), ctx, questions())
