"""Models of which some layers have a window: they store it, budgets go to the others, decoding moves it on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_decoders import gemma3
from text_model import TextModel, by_definition, text_batch
from tiny_models import IMAGE_TOKEN, PATCHES, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.policies.decoding.rule import DecodingRule
from vlcache_jax.training.batch import Conversation, pack

WINDOW, LENGTH, NEW = 9, 48, 12
LENGTHS = [40, 5, 48, 27]  # one shorter than the window
FULL, WINDOWED = [2, 5], [0, 1, 3, 4, 6]
SIZES = [(5, 6), (3, 9), (7, 2)]  # questions and answers behind one image, each shorter than the window or longer


@pytest.fixture(scope="module")
def tiny():
    reference, config, params = gemma3(window=WINDOW)
    return reference, TextModel(config), {"decoder": params}


def windows_of(state, lengths):
    """Asserts that every layer with a window holds it, and nothing else."""
    for layer in WINDOWED:
        for n, kept in zip(lengths, np.asarray(state.kept_positions(layer))):
            for head in kept:
                assert head[head >= 0].tolist() == list(range(max(0, n - WINDOW), n))


def test_uncompressed_answers_are_those_of_transformers(tiny):
    """Answers are longer than the window, so that at last no layer with one sees the prompt."""
    reference, model, params = tiny
    batch = text_batch(LENGTHS, LENGTH)
    out = vlc.generate(model, params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    for row, n in enumerate(LENGTHS):
        with torch.no_grad():
            prompt = torch.from_numpy(np.asarray(batch.tokens[row : row + 1, :n])).long()
            answer = reference.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[0, n:]
        np.testing.assert_array_equal(out.tokens[row], answer)
    assert NEW > WINDOW
    np.testing.assert_array_equal(
        np.asarray(out.report.kept)[:, WINDOWED], np.minimum(LENGTHS, WINDOW)[:, None] + [0] * 5
    )
    np.testing.assert_array_equal(np.asarray(out.report.kept)[:, FULL], np.asarray(LENGTHS)[:, None] + [0, 0])
    np.testing.assert_array_equal(out.report.kept_fraction, 1)
    # Two layers of 48 slots and five of 16, and behind the last one room for what a write does not keep.
    slots, slot_bytes = 2 * 48 + 5 * 16 + (48 - 16), 2 * 16 * 4 + 4
    assert out.report.state_bytes == 4 * (2 * slots * slot_bytes + 2 * 4 * 7)
    assert out.report.full_bytes == 4 * (2 * (2 * 48 + 5 * 16) * slot_bytes + 2 * 4 * 7)


@pytest.mark.parametrize("heads", ["each", "shared"])
def test_compressed_decoding_equals_the_full_model_with_the_rest_masked_out(tiny, heads):
    _, model, params = tiny
    batch = text_batch(LENGTHS, LENGTH)
    policy = vlc.VLCache(budget=0.3, heads=heads)
    logits, state = vlc.prefill(model, params, batch, policy).start(NEW)
    windows_of(state, LENGTHS)
    requested = np.asarray(state.allocation.requested)
    np.testing.assert_array_equal(requested[:, FULL].sum(axis=1), [max(2, int(0.3 * 2 * n)) for n in LENGTHS])
    np.testing.assert_array_equal(requested[:, WINDOWED], np.minimum(LENGTHS, WINDOW)[:, None] + [0] * 5)
    tokens, found, first = [jnp.argmax(logits, axis=-1)], [], state
    for _ in range(NEW - 1):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
        found.append(np.asarray(logits))
    kept = {layer: np.asarray(first.kept_positions(layer)) for layer in FULL}
    expected = by_definition(model, params, batch, np.asarray(tokens[:-1]), kept)
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-4, rtol=0)


POLICIES = {
    "VL-Cache, fewer candidates": vlc.VLCache(budget=0.3, candidate_fraction=0.4),
    "slots by head": vlc.AdaKV(budget=0.4),
    "merging": vlc.LookM(budget=0.4),
    "8 bits": vlc.SnapKV(budget=0.4, bits=8),
    "others at 2 bits": vlc.SnapKV(budget=0.4, evicted=vlc.Quantise(2)),
    "bytes": vlc.SnapKV(budget=vlc.Bytes(2 * (16 * 3 + 16 * 5 + 8 * 16) * (2 * 16 * 4 + 4))),
    "mass": vlc.VLCache(budget=vlc.Mass(0.8, cap=0.5)),
    "8 bits, all": vlc.FullCache(bits=8),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(tiny, name):
    """A row keeps and says the same beside others; layers with a window keep it under every policy.

    Alone, under one policy: `test_blocks.py`. Here as many rows as before, so that nothing is compiled again.
    """
    _, model, params = tiny
    batch, policy = text_batch(LENGTHS, LENGTH, seed=1), POLICIES[name]
    _, state = vlc.prefill(model, params, batch, policy).start(NEW)
    windows_of(state, LENGTHS)
    out = vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[])
    assert np.asarray(out.report.finite).all()
    assert out.report.state_bytes == sum(store.nbytes for store in state.stores)
    if isinstance(policy.budget, vlc.Bytes):
        assert out.report.state_bytes <= 4 * policy.budget.count
    rows = np.array([3, 3, 1, 1])
    other = vlc.generate(model, params, jax.tree.map(lambda x: x[rows], batch), policy, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(other.tokens, out.tokens[rows])
    np.testing.assert_array_equal(other.report.kept, out.report.kept[rows])


def test_questions_to_one_context(tiny):
    """Questions of different lengths share the windows of their prompt, then go on; as if each had been put alone."""
    reference, model, params = tiny
    batch = text_batch(LENGTHS, LENGTH)
    rng = np.random.default_rng(5)
    asked = vlc.Continuation(
        rng.integers(3, 64, (4, 2, 12)).astype(np.int32), np.array([[3, 12], [1, 7], [5, 2], [9, 9]], np.int32)
    )
    ctx = vlc.compress(model, params, batch)
    out = vlc.answer(ctx, asked, max_new_tokens=NEW, eos_token_ids=[])
    turned = vlc.answer(vlc.extend(ctx, asked, out), asked, max_new_tokens=4, eos_token_ids=[])
    for row, question in np.ndindex(4, 2):
        text = np.asarray(asked.tokens[row, question, : asked.lengths[row, question]])
        prompt = np.concatenate([batch.tokens[row, : LENGTHS[row]], text])
        for found in (out, turned):
            answer = np.asarray(found.tokens).reshape(4, 2, -1)[row, question]
            with torch.no_grad():  # each token follows from those before it
                logits = reference(torch.from_numpy(np.concatenate([prompt, answer])[None]).long()).logits[0]
            np.testing.assert_array_equal(answer, logits[len(prompt) - 1 : -1].argmax(dim=-1).numpy())
            prompt = np.concatenate([prompt, answer, text])


def test_free_slots_are_never_read(tiny):
    _, model, params = tiny
    batch = text_batch(LENGTHS, LENGTH)
    logits, state = vlc.prefill(model, params, batch, vlc.FullCache()).start(NEW)
    context = state.context
    free = (np.asarray(context.positions) < 0)[..., None]
    spoilt = {name: jnp.where(free, jnp.nan, getattr(context, name)) for name in ("keys", "values")}
    other = dataclasses.replace(state, context=dataclasses.replace(context, **spoilt))
    for _ in range(3):
        token = jnp.argmax(logits, axis=-1)
        (logits, state), (found, other) = (vlc.decode_step(model, params, token, x) for x in (state, other))
        np.testing.assert_array_equal(logits, found)


def test_a_model_of_windows_alone_has_nothing_to_evict():
    _, config, params = gemma3(window=WINDOW, layers=2)
    model, params = TextModel(config), {"decoder": params}
    assert model.spec.full_layers == ()
    batch = text_batch(LENGTHS, LENGTH)
    full, small = (vlc.generate(model, params, batch, p, 4) for p in (vlc.FullCache(), vlc.VLCache(budget=0.1)))
    np.testing.assert_array_equal(full.tokens, small.tokens)


def test_a_rule_that_does_not_know_windows_says_so(tiny):
    class Own(DecodingRule):
        def tail_tokens(self, max_new_tokens):
            return max_new_tokens

    _, model, params = tiny
    with pytest.raises(vlc.PolicyError, match="'snap_kv': Own does not know how to move the windows on"):
        vlc.prefill(model, params, text_batch(LENGTHS, LENGTH), vlc.SnapKV(budget=0.5, decoding=Own()))


def test_a_family_with_windows():
    """Its `forward` and its caches know them: both give the same next token's logits."""
    model, params = tiny_llava(windows=(WINDOW, None, WINDOW))
    batch = ragged_batch(rows=3, length=48, tiles=1)
    assert model.spec.windows == (WINDOW, None, WINDOW)
    every = model.apply({"params": params}, batch, method="forward")
    last = np.take_along_axis(np.asarray(every), np.asarray(batch.lengths)[:, None, None] - 1, axis=1)[:, 0]
    context = vlc.prefill(model, params, batch, vlc.FullCache())
    np.testing.assert_allclose(context.logits, last, rtol=1e-5, atol=1e-5)
    kept = np.asarray(context.kept_positions(0))
    for row, n in enumerate(np.asarray(batch.lengths)):
        assert sorted(set(kept[row].ravel()) - {-1}) == list(range(max(0, n - WINDOW), n))
    full, _ = tiny_llava()
    other = full.apply({"params": params}, batch, method="forward")
    assert np.abs(np.asarray(other) - np.asarray(every)).max() > 1e-3


def test_packed_texts_are_what_they_are_alone():
    """The window of a question's tokens reaches past the questions before it, to the images that all of them see."""
    model, params = tiny_llava(windows=(WINDOW, None, WINDOW))
    rng = np.random.default_rng(8)
    prefix = [*rng.integers(6, 64, 4), *[IMAGE_TOKEN] * PATCHES]
    index = [*[TEXT] * 4, *range(PATCHES)]
    texts = [([int(x) for x in rng.integers(6, 64, a)], [int(x) for x in rng.integers(6, 64, b)]) for a, b in SIZES]
    pixels = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
    packed, *alone = (
        pack([Conversation(prefix, index, some, pixels)], 64) for some in (texts, *([text] for text in texts))
    )

    def run(train):
        given = train.batch, train.positions, train.segments
        return np.asarray(model.apply({"params": params}, *given, method="forward"))[0]

    together, at = run(packed), len(prefix)
    for (question, answer), single in zip(texts, alone):
        size, end = len(question) + len(answer), len(prefix)
        np.testing.assert_allclose(together[at : at + size], run(single)[end : end + size], atol=2e-5)
        at += size
    assert at > len(prefix) + 2 * WINDOW
    plain, n = model.apply({"params": params}, alone[1].batch, method="forward")[0], int(alone[1].batch.lengths[0])
    np.testing.assert_allclose(run(alone[1])[:n], plain[:n], atol=2e-5)
