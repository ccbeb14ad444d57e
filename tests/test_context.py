"""Compress once, ask many: what a context answers, and that it is never copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.parallel.params import param_shardings

NEW = 6
ROWS, QUESTIONS = 2, 2
POLICY = vlc.KeyDifference(budget=0.4)
FREE = {"eos_token_ids": []}


def questions(rows=ROWS, each=QUESTIONS, length=7, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, (rows, each)).astype(np.int32)
    lengths.flat[0] = length
    return vlc.Continuation(rng.integers(6, 64, (rows, each, length)).astype(np.int32), lengths)


def followed_by(batch, *texts, length=96):
    """The batch of the whole prompts, a row for each entry of the texts (anything with tokens and lengths)."""
    texts = [(np.asarray(t.tokens).reshape(-1, t.tokens.shape[-1]), np.asarray(t.lengths).reshape(-1)) for t in texts]
    each = len(texts[0][1]) // batch.size
    tokens, index = np.zeros((each * batch.size, length), np.int32), np.full((each * batch.size, length), -1, np.int32)
    lengths = np.repeat(batch.lengths, each)
    for row in range(len(lengths)):
        n, of_context = lengths[row], row // each
        tokens[row, :n], index[row, :n] = batch.tokens[of_context, :n], batch.vision_index[of_context, :n]
        for ids, sizes in texts:
            tokens[row, lengths[row] : lengths[row] + sizes[row]] = ids[row, : sizes[row]]
            lengths[row] += sizes[row]
    return vlc.Batch(tokens, lengths, index, np.repeat(batch.pixels, each, axis=0))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of this file's time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=ROWS)


@pytest.fixture(scope="module")
def full(llava, batch):
    return vlc.compress(*llava, batch)


@pytest.fixture(scope="module")
def ctx(llava, batch):
    return vlc.compress(*llava, batch, POLICY)


@pytest.fixture(scope="module")
def answers(ctx):
    return vlc.answer(ctx, questions(), NEW, **FREE)


def test_a_conversation_is_one_long_prompt(llava, batch, full):
    """Two questions to each prompt, then another in each of the four conversations."""
    first, second = questions(), questions(ROWS * QUESTIONS, 1, seed=1)
    asked = vlc.extend(full, first)
    out = vlc.answer(asked, max_new_tokens=NEW)
    again = vlc.extend(asked, out, second)
    more = vlc.answer(again, max_new_tokens=NEW)
    last = vlc.extend(again, more)
    for ctx, history in ((asked, [first]), (again, [first, out, second]), (last, [first, out, second, more])):
        assert ctx.stores[0] is full.stores[0]
        assert len(ctx.stores) == 2, "turns share a store"
        whole = followed_by(batch, *history)
        np.testing.assert_array_equal(ctx.next_position, whole.lengths)
        logits, state = vlc.prefill(*llava, whole, vlc.FullCache()).start(NEW)
        np.testing.assert_allclose(ctx.logits, logits, atol=1e-5)
        if ctx is not last:
            answer, (tokens, lengths) = out if ctx is asked else more, vlc.decode(*llava, logits, state, NEW)
            np.testing.assert_array_equal(answer.tokens, tokens)
            np.testing.assert_array_equal(answer.lengths, lengths)


def test_a_question_in_the_prompt_is_generate(llava, batch, ctx):
    plain = vlc.generate(*llava, batch, POLICY, NEW, **FREE)
    out = vlc.answer(ctx, max_new_tokens=NEW, **FREE)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
    assert out.report.state_bytes == plain.report.state_bytes == ctx.nbytes
    assert out.report.tail_bytes == plain.report.tail_bytes
    tokens, _ = vlc.decode(*llava, *ctx.start(NEW), NEW, **FREE)
    np.testing.assert_array_equal(tokens, plain.tokens)


@pytest.mark.bits
def test_every_question_is_answered_as_if_alone(llava, batch, ctx, answers):
    asked = questions()
    for row in range(ROWS):
        alone = vlc.compress(*llava, one_row(batch, row, batch.length), POLICY)
        for number in range(QUESTIONS):
            one = vlc.Continuation(asked.tokens[row, number][None], asked.lengths[row, number][None])
            out = vlc.answer(alone, one, NEW, **FREE)
            assert out.tokens.shape == (1, NEW)
            np.testing.assert_array_equal(out.tokens[0], answers.tokens[row, number])
    assert len({tuple(tokens) for tokens in np.asarray(answers.tokens).reshape(-1, NEW).tolist()}) > 1


def test_samples_are_branches_with_seeds_of_their_own(ctx):
    options = {"sampling": vlc.Sampling(temperature=5.0), **FREE}
    asked = vlc.extend(ctx, questions())
    out = vlc.answer(asked, None, NEW, samples=3, seeds=7, **options)
    assert out.tokens.shape == (ROWS * QUESTIONS, 3, NEW)
    for sample in range(3):
        one = vlc.answer(asked, None, NEW, seeds=7 + sample, **options)
        np.testing.assert_array_equal(out.tokens[:, sample], one.tokens)
    assert not np.array_equal(out.tokens[:, 0], out.tokens[:, 1])


@pytest.mark.parametrize("decoding", ["window:4", "recompress:4", "evict"])
def test_every_rule_for_generated_tokens(llava, batch, decoding, tmp_path):
    """Answers work on a copy of what a rule rewrites, every branch on its own."""
    ctx = vlc.compress(*llava, batch, vlc.H2O(budget=0.4, decoding=decoding))
    options = {"sampling": vlc.Sampling(temperature=4.0), **FREE}
    drawn = vlc.answer(ctx, None, NEW, samples=2, seeds=7, **options)
    for i in range(2):
        alone = vlc.generate(*llava, batch, vlc.H2O(budget=0.4, decoding=decoding), NEW, seeds=7 + i, **options)
        np.testing.assert_array_equal(drawn.tokens[:, i], alone.tokens)
    np.testing.assert_array_equal(vlc.answer(ctx, None, NEW, seeds=8, **options).tokens, drawn.tokens[:, 1])
    path = tmp_path / "context.safetensors"
    if decoding != "window:4":
        with pytest.raises(vlc.PolicyError, match=r"'h2o' has the rule decoding=.* nothing can be appended"):
            vlc.answer(ctx, questions())
        with pytest.raises(vlc.InputError, match=r"rewrites what was kept: a file holds"):
            vlc.save_context(ctx, path)
        return
    vlc.save_context(ctx, path)
    again = vlc.load_context(path, *llava)
    assert again.decoding == vlc.RollingWindow(4)
    np.testing.assert_array_equal(vlc.answer(again, None, NEW, seeds=8, **options).tokens, drawn.tokens[:, 1])


def test_pure_and_compiled_once(ctx, answers):
    traces = []

    @jax.jit
    def run(ctx, asked):
        traces.append(1)
        out = vlc.answer(ctx, asked, NEW, **FREE)
        return out.tokens, vlc.extend(ctx, asked, out).logits

    for seed in range(3):
        tokens, logits = run(ctx, questions(seed=seed))
        if seed == 0:
            np.testing.assert_array_equal(tokens, answers.tokens)
            again = vlc.extend(ctx, questions(), answers)
            np.testing.assert_allclose(logits, again.logits, atol=1e-5)
    assert len(traces) == 1


def test_free_slots_are_never_read(ctx, answers):
    def poisoned(store):
        free = (store.positions < 0)[..., None]
        assert bool(jnp.any(free))
        return dataclasses.replace(
            store, keys=jnp.where(free, jnp.nan, store.keys), values=jnp.where(free, jnp.nan, store.values)
        )

    dirty = dataclasses.replace(ctx, stores=tuple(map(poisoned, ctx.stores)))
    np.testing.assert_array_equal(vlc.answer(dirty, questions(), NEW, **FREE).tokens, answers.tokens)
    clean, dirty = (vlc.extend(c, questions(), answers) for c in (ctx, dirty))
    dirty = dataclasses.replace(dirty, stores=tuple(map(poisoned, dirty.stores)))
    more = questions(ROWS * QUESTIONS, 1, seed=3)
    clean, dirty = (vlc.extend(c, more) for c in (clean, dirty))
    np.testing.assert_array_equal(clean.logits, dirty.logits)
    assert bool(jnp.all(jnp.isfinite(jnp.where((dirty.stores[1].positions >= 0)[..., None], dirty.stores[1].keys, 0))))


def test_bfloat16(batch):
    model, params = tiny_llava("bfloat16")
    asked = questions()
    ctx = vlc.extend(vlc.compress(model, params, batch), asked)
    assert {store.keys.dtype for store in ctx.stores} == {jnp.dtype("bfloat16")}
    plain, _ = vlc.prefill(model, params, followed_by(batch, asked), vlc.FullCache()).start(1)
    np.testing.assert_allclose(ctx.logits, plain, atol=0.05 * float(jnp.std(plain)))


def test_one_context_on_all_devices_of_a_mesh(llava):
    """Four questions on four times two devices, each of which has the context's only row (of its KV heads)."""
    model, params = llava
    batch, asked = ragged_batch(rows=1, seed=2), questions(1, 4)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    there = jax.device_put(batch, NamedSharding(mesh, PartitionSpec()))
    ctx = vlc.compress(model, placed, there, POLICY)
    asked_there = vlc.extend(ctx, asked)
    for store, spec in zip(asked_there.stores, (PartitionSpec(None, "model"), PartitionSpec("data", "model"))):
        assert store.keys.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), store.keys.sharding
    out = vlc.answer(asked_there, max_new_tokens=NEW, **FREE)
    plain = vlc.answer(vlc.compress(model, params, batch, POLICY), asked, NEW, **FREE)
    np.testing.assert_array_equal(out.tokens, plain.tokens[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: vlc.extend(c), "at least one block"),
        (lambda c: vlc.extend(c, "what is it?"), "a str cannot be appended"),
        (lambda c: vlc.extend(c, questions(3, 1)), r"3 questions cannot be shared out to the context's 2 rows"),
        (lambda c: vlc.extend(c, questions(2, 1), questions(2, 2)), r"blocks have \[2, 4\] entries"),
        (lambda c: vlc.extend(c, vlc.Continuation(np.ones((2, 3), np.int32), [1, 4])), "must lie between 1 and"),
        (lambda c: vlc.extend(c, vlc.Continuation(np.ones((2, 3), np.int32), [0, 1])), "lengths from 0 to 1"),
        (lambda c: vlc.extend(c, vlc.Continuation(np.ones(3, np.int32), [1])), r"want \[..., length\]"),
        (
            lambda c: vlc.extend(c, questions(2, 1, 240)),
            r"\d+ of the context \+ 240 appended \+ 0 new ones\) but the model has 256",
        ),
        (lambda c: vlc.answer(c, max_new_tokens=256), r"0 appended \+ 256 new ones\) but the model has 256"),
        (lambda c: vlc.answer(c, questions(), 230), r"\d+ appended \+ 230 new ones\) but the model has 256"),
        (lambda c: vlc.answer(c, "what is it?"), "a str cannot be appended"),
        (lambda c: vlc.extend(c, vlc.Continuation(np.ones((2, 3)), [1, 1])), "want whole numbers"),
        (lambda c: vlc.answer(c, max_new_tokens=0), "max_new_tokens=0"),
        (lambda c: vlc.answer(c, samples=2), "would all be the same"),
        (lambda c: vlc.answer(c, samples=0), "samples=0"),
        (lambda c: vlc.answer(c, None, NEW, seeds=[1, 2, 3]), r"seeds of shape \(3,\) do not fit answers \(2,\)"),
        (lambda c: c.start(NEW, rows=3), "rows=3 is not a multiple"),
    ],
)
def test_bad_input(ctx, call, message):
    with pytest.raises(vlc.InputError, match=message):
        call(ctx)


def test_the_context_is_neither_copied_nor_repeated():
    """32 questions to one long prompt: temporaries, and the questions' own stores, are next to nothing beside it."""
    model, params = tiny_llava()
    long = dataclasses.replace(model.config.decoder, max_positions=200_000)
    model = Llava(dataclasses.replace(model.config, decoder=long), model.dtype)
    batch = ragged_batch(rows=1, length=100_000)
    shape = jax.eval_shape(lambda p: vlc.compress(model, p, batch), params)
    asked = questions(1, 32, length=4)
    run = jax.jit(lambda ctx, asked: (vlc.answer(ctx, asked, NEW).tokens, vlc.extend(ctx, asked).stores[1:]))
    memory = run.lower(shape, asked).compile().memory_analysis()
    assert shape.nbytes > 100_000 * 3 * 2 * 2 * 8 * 4
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.05 * shape.nbytes
