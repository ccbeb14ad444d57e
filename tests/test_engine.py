"""The engine: a request's answer depends on nothing but the request."""

import dataclasses
import functools
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.engine.buckets import Bucket
from vlcache_jax.engine.memory import need
from vlcache_jax.parallel.params import param_shardings

PROMPTS, ROOM, BUCKETS = 12, 16, [(24, 2), (40, 2)]
SAMPLINGS = (
    None,
    vlc.Sampling(temperature=2.0),
    vlc.Sampling(temperature=3.0, top_k=4),
    vlc.Sampling(temperature=1.5, top_p=0.6),
)


class Letters:
    """A processor's tokenizer: one character for each of the 64 ids."""

    @staticmethod
    def decode(ids):
        return "".join(chr(48 + i) for i in ids)


@functools.cache
def vlm():
    model, params = tiny_llava(layers=2)
    return types.SimpleNamespace(model=model, params=params, processor=types.SimpleNamespace(tokenizer=Letters))


@functools.cache
def engine():
    return vlc.Engine(
        vlm(), vlc.VLCache(budget=0.4), rows=4, max_new_tokens=ROOM, buckets=BUCKETS, prefill_rows=2, steps=5
    )


@functools.cache
def prompts():
    batch = ragged_batch(rows=PROMPTS, length=40)
    return [one_row(batch, row) for row in range(PROMPTS)]


def asked(rng):
    """A random request, of few enough kinds that each need not be run alone many times."""
    stop_ids = [[], [7, 11, 30, 41]][rng.integers(2)]
    return vlc.Request(
        prompt=prompts()[rng.integers(PROMPTS)],
        max_new_tokens=int(rng.choice([1, 2, 5, 9, ROOM])),
        sampling=SAMPLINGS[rng.integers(len(SAMPLINGS))],
        seed=int(rng.integers(2)),
        eos_token_ids=stop_ids,
        stop=["Z", "B9"] if rng.integers(2) else [],
    )


def key(request):
    return (id(request.prompt), str(dataclasses.replace(request, prompt="", id=None)))


def check_arrivals(number, seed):
    """Every result equals that of the request alone; the iterable is late now and then."""
    rng = np.random.default_rng(seed)
    requests = [dataclasses.replace(asked(rng), id=i) for i in range(number)]

    def arriving():
        for request in requests:
            if rng.integers(50) == 0:
                threading.Event().wait(0.01)
            yield request

    results = list(engine().run(arriving()))
    assert sorted(result.index for result in results) == list(range(number))
    alone = {}
    for result in results:
        request = requests[result.index]
        if key(request) not in alone:
            (alone[key(request)],) = engine().run([request])
        expected = alone[key(request)]
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        assert (result.text, result.finish, result.id) == (expected.text, expected.finish, request.id)
        assert (result.kept_fraction, result.exact) == (expected.kept_fraction, expected.exact)


@pytest.mark.bits
def test_random_arrivals_equal_single_runs():
    check_arrivals(200, seed=0)


@pytest.mark.thorough
def test_ten_thousand_arrivals():
    check_arrivals(10_000, seed=1)


def test_answers_are_those_of_generate():
    model, params = vlm().model, vlm().params
    options = {"max_new_tokens": 9, "eos_token_ids": [], "log_probabilities": True}
    requests = [vlc.Request(prompt=prompt, sampling=SAMPLINGS[3], **options) for prompt in prompts()]
    batch = ragged_batch(rows=PROMPTS, length=40)
    expected = vlc.generate(model, params, batch, vlc.VLCache(budget=0.4), sampling=SAMPLINGS[3], **options)
    for result in engine().run(requests):
        np.testing.assert_array_equal(result.tokens, expected.tokens[result.index])
        for name in ("log_probabilities", "sampling_log_probabilities"):
            np.testing.assert_allclose(getattr(result, name), getattr(expected, name)[result.index], atol=1e-5)
        np.testing.assert_allclose(result.kept_fraction, expected.report.kept_fraction[result.index])
        assert result.exact == bool(expected.report.exact[result.index])
        assert result.prompt_tokens == int(prompts()[result.index].lengths[0])


def test_programs_are_those_that_were_counted():
    """In warm-up exactly as many as said, and none afterwards."""
    own = vlc.Engine(vlm(), vlc.SnapKV(budget=0.8, window=4), rows=3, max_new_tokens=ROOM, buckets=BUCKETS)
    stats = own.warmup()
    assert stats.programs == 2 * len(BUCKETS) + 3
    assert stats.compilations == stats.programs
    rng = np.random.default_rng(2)
    assert len(list(own.run(asked(rng) for _ in range(30)))) == 30
    assert own.stats().compilations == stats.compilations


def test_samples_share_one_prefill_and_differ():
    before = engine().stats()
    request = vlc.Request(prompt=prompts()[3], samples=7, sampling=SAMPLINGS[1], seed=-3, eos_token_ids=[])
    results = list(engine().run([request], ordered=True))
    assert [(result.index, result.sample, result.answers) for result in results] == [(0, i, 7) for i in range(7)]
    assert engine().stats().prompt_tokens - before.prompt_tokens == results[0].prompt_tokens
    for result in results:
        single = dataclasses.replace(request, samples=1, seed=-3 + result.sample)
        np.testing.assert_array_equal(result.tokens, next(iter(engine().run([single]))).tokens)
    assert len({tuple(result.tokens) for result in results}) > 1


@functools.cache
def asking():
    return vlc.Engine(
        vlm(), vlc.KeyDifference(budget=0.5), rows=5, max_new_tokens=ROOM, buckets=BUCKETS[1:], prefill_rows=2,
        question_tokens=5,
    )  # fmt: skip


def test_questions_share_one_prefill():
    """Each answer is that of `vlc.answer` to a context; requests without questions run beside them."""
    batch, rng = ragged_batch(rows=PROMPTS, length=40), np.random.default_rng(6)
    ctx = vlc.compress(vlm().model, vlm().params, batch, vlc.KeyDifference(budget=0.5))
    lengths = rng.integers(1, 6, (PROMPTS, 3)).astype(np.int32)
    questions = vlc.Continuation(rng.integers(6, 64, (PROMPTS, 3, 5)).astype(np.int32), lengths)
    options = {"sampling": SAMPLINGS[1], "eos_token_ids": [7]}
    expected = vlc.answer(ctx, questions, 9, samples=2, seeds=4, **options)
    plain = vlc.answer(ctx, None, 9, seeds=4, **options)
    requests = []
    for row in range(PROMPTS):
        base = vlc.Request(prompt=prompts()[row], max_new_tokens=9, seed=4, **options)
        own = vlc.Continuation(questions.tokens[row], questions.lengths[row])
        requests += [dataclasses.replace(base, questions=own, samples=2), base]
    before = asking().warmup()
    results = list(asking().run(requests, ordered=True))
    assert [(r.index, r.question, r.sample) for r in results[:7]] == [
        *((0, question, sample) for question in range(3) for sample in range(2)),
        (1, 0, 0),
    ]
    for result in results:
        row, other = divmod(result.index, 2)
        tokens, n = (plain.tokens[row], plain.lengths[row]) if other else (
            expected.tokens[row, result.question, result.sample], expected.lengths[row, result.question, result.sample]
        )  # fmt: skip
        np.testing.assert_array_equal(result.tokens, tokens[: int(n)])
    assert before.programs == before.compilations == 3 + 3 == asking().stats().compilations
    assert asking().stats().prompt_tokens == 2 * int(batch.lengths.sum())


def test_a_stop_text_ends_an_answer_where_it_is():
    free = vlc.Request(prompt=prompts()[0], sampling=SAMPLINGS[1], eos_token_ids=[])
    (whole,) = engine().run([free])
    stop = whole.text[6:8]
    (cut,) = engine().run([dataclasses.replace(free, stop=["no such", stop])])
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: whole.text.index(stop) + 2])


def test_an_answer_is_followed_and_given_up():
    """Whoever follows sees beginnings of the answer; a row that nobody wants is free, and others never notice."""
    request = vlc.Request(prompt=prompts()[4], sampling=SAMPLINGS[1], eos_token_ids=[])
    (whole,) = engine().run([request])
    seen = {"all": [], "some": [], "none": [], "broken": []}

    def following(name, wanted):
        def follow(result):
            assert (result.finish, result.id, result.text) == ("running", name, None)
            seen[name].append(result.tokens.tolist())
            return wanted(len(result.tokens))

        return dataclasses.replace(request, id=name, follow=follow)

    asked = [
        following("all", lambda n: None),
        following("some", lambda n: n < 5),
        following("none", lambda n: False),
        following("broken", lambda n: 1 / 0),
    ]
    before = engine().stats()
    results = {result.id: result for result in engine().run(asked)}
    np.testing.assert_array_equal(results["all"].tokens, whole.tokens)
    for tokens in (*seen["all"], *seen["some"]):
        assert tokens == whole.tokens[: len(tokens)].tolist()
    assert [len(tokens) for tokens in seen["all"] if tokens] == [6, 11]  # one token from the prompt, and steps of five
    assert [len(tokens) for tokens in seen["some"] if tokens] == [6]
    assert (results["some"].finish, len(results["some"].tokens), results["some"].ok) == ("cancelled", 6, False)
    assert (results["none"].finish, len(results["none"].tokens), seen["none"]) == ("cancelled", 0, [[]])
    assert "follow raised ZeroDivisionError" in results["broken"].reason
    after = engine().stats()
    assert (after.cancelled - before.cancelled, after.failed - before.failed) == (2, 1)


def test_a_future_that_is_cancelled_frees_its_rows():
    started = threading.Event()
    request = vlc.Request(prompt=prompts()[5], eos_token_ids=[])
    futures = [
        engine().submit(dataclasses.replace(request, samples=3, sampling=SAMPLINGS[1], follow=lambda _: started.set()))
    ]
    futures += [engine().submit(request) for _ in range(2)]
    futures[1].cancel()
    assert started.wait(60)
    futures[0].cancel()
    (result,) = futures[2].result(timeout=60)
    assert result.ok
    engine().close()
    assert engine().stats().rows_in_flight == 0


def test_results_in_order():
    rng = np.random.default_rng(3)
    requests = [dataclasses.replace(asked(rng), sampling=SAMPLINGS[1], samples=1 + i % 3) for i in range(20)]
    found = [(result.index, result.sample) for result in engine().run(requests, ordered=True)]
    assert found == [(i, sample) for i in range(20) for sample in range(1 + i % 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "text"}, "TypeError"),
        ({"prompt": ragged_batch(rows=2)}, "a batch of 2 rows"),
        ({"prompt": one_row(ragged_batch(length=60), 1, 60)}, "larger than all of the engine's buckets"),
        ({"max_new_tokens": 17}, "more than the engine's 16"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples": 2}, "greedy answers would be the same"),
        ({"samples": 0}, "samples=0"),
        ({"stop": "text"}, "give a list of texts"),
        ({"eos_token_ids": range(9)}, "9 stop ids are more than the 8"),
        ({"sampling": 0.7}, "is no vlc.Sampling"),
        ({"seed": "x"}, "InputError"),
        ({"questions": "what?"}, "questions='what?': give a list of texts"),
        ({"questions": vlc.Continuation(np.ones((1, 2), np.int32), [2])}, "longer than the engine's question_tokens=0"),
    ],
)
def test_a_bad_request_fails_alone(changes, message):
    good = vlc.Request(prompt=prompts()[1], max_new_tokens=3, eos_token_ids=[])
    bad = dataclasses.replace(good, id="bad", **changes)
    results = list(engine().run([good, bad, good], ordered=True))
    assert [result.ok for result in results] == [True, False, True]
    assert message in results[1].reason
    assert (results[1].id, results[1].finish, len(results[1].tokens)) == ("bad", "failed", 0)
    np.testing.assert_array_equal(results[0].tokens, results[2].tokens)


def test_what_is_no_request_fails_alone():
    (result,) = engine().run(["a prompt"])
    assert "a request is a str" in result.reason


def test_an_error_of_the_iterable_is_raised_behind_the_results():
    def broken():
        yield vlc.Request(prompt=prompts()[1], max_new_tokens=3)
        raise KeyError("mine")

    results = engine().run(broken())
    assert next(results).ok
    with pytest.raises(KeyError, match="mine"):
        next(results)
    assert len(list(engine().run([vlc.Request(prompt=prompts()[1])]))) == 1


def test_a_run_that_is_left_early_harms_no_other():
    rng = np.random.default_rng(4)
    requests = [asked(rng) for _ in range(30)]
    expected = list(engine().run(requests[:1]))
    running = engine().run(requests)
    next(running)
    with pytest.raises(vlc.InputError, match="runs already"):
        next(engine().run(requests))
    running.close()
    np.testing.assert_array_equal(next(engine().run(requests[:1])).tokens, expected[0].tokens)


def test_submitted_by_many_threads():
    own = engine()
    rng = np.random.default_rng(5)
    requests = [dataclasses.replace(asked(rng), id=i) for i in range(40)]
    expected = {result.id: result for result in own.run(requests)}
    futures = {}

    def client(mine):
        futures.update({request.id: own.submit(request) for request in mine})

    threads = [threading.Thread(target=client, args=(requests[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, future in futures.items():
        (result,) = future.result(timeout=60)
        assert result.id == name
        np.testing.assert_array_equal(result.tokens, expected[name].tokens)
    own.close()


def test_buckets_are_chosen_for_the_first_requests():
    own = vlc.Engine(vlm(), rows=2, max_new_tokens=4)
    requests = [vlc.Request(prompt=prompt) for prompt in prompts()]
    assert all(result.ok for result in own.run(requests))
    assert own.buckets == {(64, 2, 1): 2}
    assert 0 < own.stats().padding_share < 1
    with pytest.raises(vlc.InputError, match=r"no prompt to choose buckets for.*a request is a int"):
        vlc.Engine(vlm()).warmup([3])


def test_as_many_rows_as_fit():
    """By what the compiler says: the buffers of the rows themselves are no larger."""

    def automatic(policy, memory):
        options = {"max_new_tokens": ROOM, "buckets": [(40, 2)], "prefill_rows": 2, "most_rows": 256}
        own = vlc.Engine(vlm(), policy, memory_bytes=memory, **options)
        return own.warmup(), own

    few, own = automatic(vlc.FullCache(), 1_000_000)
    held = sum(x.nbytes for x in jax.tree.leaves(own._state.kv))
    assert 0.7 < held / (1_000_000 - need(own._programs, Bucket(40, 2), 2).prefill) <= 1
    smaller = dataclasses.replace(own._programs, recipe=vlc.Recipe(vlc.VLCache(budget=0.4)))
    assert few.compilations == few.programs == 2 + 3 + 1
    more = need(smaller, Bucket(40, 2), 2).rows(1_000_000)
    assert more > few.rows  # most of a row is room for the answer here
    with pytest.raises(vlc.InputError, match="no row fits into 1,000 bytes"):
        automatic(vlc.FullCache(), 1_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"buckets": [(0, 1)]}, "give pairs"),
        ({"buckets": 512}, "give pairs"),
        ({"buckets": [(512, 1)]}, "larger than the model's 256 positions"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(vlc.InputError, match=message):
        vlc.Engine(vlm(), **options)


def test_a_rule_that_rewrites_the_context_needs_one_bucket():
    policy = vlc.H2O(budget=0.4, decoding="evict")
    with pytest.raises(vlc.PolicyError, match=r"buckets=\[\(40, 2\)\]"):
        vlc.Engine(vlm(), policy, buckets=BUCKETS)
    with pytest.raises(vlc.PolicyError, match="leave question_tokens out"):
        vlc.Engine(vlm(), policy, buckets=BUCKETS[:1], question_tokens=8)


def test_on_a_mesh():
    """Rows split over data, heads over model: the same answers, and nothing is compiled after warming up."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(vlm().params, param_shardings(vlm().model.abstract_params(), mesh))
    there = types.SimpleNamespace(model=vlm().model, params=placed, processor=vlm().processor)
    options = {"max_new_tokens": ROOM, "buckets": BUCKETS[1:], "prefill_rows": 4}
    own = vlc.Engine(there, vlc.VLCache(budget=0.4), rows=8, **options)
    assert own._programs.split == 4
    stats = own.warmup()
    assert stats.programs - 1 <= stats.compilations <= stats.programs  # one may be there since tests/test_rows.py
    rng = np.random.default_rng(7)
    requests = [dataclasses.replace(asked(rng), id=i) for i in range(30)]
    expected = {result.id: result.tokens for result in engine().run(requests)}
    for result in own.run(requests):
        np.testing.assert_array_equal(result.tokens, expected[result.id])
    assert own.stats().compilations == stats.compilations
    pool = own._state.kv.context.keys
    assert pool.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "model")), 4)
