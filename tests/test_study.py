"""The fidelity study on tiny random models: replayed prompts, oracle, measures, results, pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.demo.study.answers import answer_before, images_end, split
from vlcache_jax.demo.study.heat_maps import kept_tokens as draw_kept
from vlcache_jax.demo.study.measure import held, kept_tokens, store_bytes
from vlcache_jax.demo.study.methods import BUDGETS, FULL, Method, all_methods, choose, choose_methods
from vlcache_jax.demo.study.oracle import answer_attention, oracle, oracle_by_mass, with_answer_attention
from vlcache_jax.demo.study.pages import write_pages
from vlcache_jax.demo.study.recording import Replay, record
from vlcache_jax.demo.study.results import FILE, Key, Result, ResultFile
from vlcache_jax.demo.study.summary import Table, tables
from vlcache_jax.demo.study.tasks import score, score_name
from vlcache_jax.errors import InputError, PolicyError

NEW = 6


@pytest.fixture(scope="module")
def setting():
    model, params = tiny_llava()
    batch = ragged_batch(rows=4)
    recording = record(model, params, batch)
    out = vlc.generate(model, params, batch, vlc.FullCache(), NEW, eos_token_ids=())
    lengths = jnp.asarray(batch.lengths)
    attention = answer_attention(model, params, recording, lengths, out.tokens, out.lengths)
    return model, params, batch, recording, out, attention


def compressed(setting, policy, recording=None):
    model, params, batch, own, *_ = setting
    params = {"model": params, "recording": own if recording is None else recording}
    small = dataclasses.replace(batch, pixels=batch.pixels[:, :0])
    return vlc.prefill(Replay(model), params, small, policy).start(NEW)


def replayed(setting, policy, recording=None):
    model, params, *_ = setting
    logits, state = compressed(setting, policy, recording)
    params = {"model": params, "recording": setting[3]}
    return vlc.decode(Replay(model), params, logits, state, NEW, eos_token_ids=()), state


def measure(state, attention):
    return held(state.stores, state.next_position, attention)


@pytest.mark.parametrize("name", ["expected_attention", *later("vl_cache_grid")])
def test_a_replay_answers_as_generate_does(setting, name):
    model, params, batch, *_ = setting
    policy = Method(name).policy(0.2, grid_side=4)
    (tokens, lengths), state = replayed(setting, policy)
    out = vlc.generate(model, params, batch, policy, NEW, eos_token_ids=())
    np.testing.assert_array_equal(tokens, out.tokens)
    np.testing.assert_array_equal(lengths, out.lengths)
    kept = kept_tokens(state.stores, batch.length, model.spec.num_kv_heads)
    np.testing.assert_array_equal(jnp.max(jnp.sum(kept, axis=-1), axis=2).T, out.report.kept)
    assert store_bytes(state.stores) == out.report.state_bytes


def test_a_replay_of_prompts_said_twice_serves_every_policy(setting):
    model, params, batch, once, *_ = setting
    twice = record(model, params, batch, repeated=True)
    assert twice.key.shape[2] == 2 * batch.length
    np.testing.assert_allclose(twice.logits, once.logits, atol=1e-5)
    for policy in (vlc.KVzip(0.3), vlc.SnapKV(0.3)):
        (tokens, _), state = replayed(setting, policy, twice)
        out = vlc.generate(model, params, batch, policy, NEW, eos_token_ids=())
        np.testing.assert_array_equal(tokens, out.tokens)
        _, own = vlc.prefill(model, params, batch, policy).start(NEW)
        kept = (kept_tokens(x.stores, batch.length, model.spec.num_kv_heads) for x in (state, own))
        np.testing.assert_array_equal(*kept)


def test_answer_attention_is_that_of_one_forward(setting):
    """Against softmax(q k) of the whole text, prompt and answer, row by row."""
    model, params, batch, _, out, attention = setting
    row = 1
    n, new = int(batch.lengths[row]), int(out.lengths[row])
    text = np.concatenate([batch.tokens[row, :n], np.asarray(out.tokens)[row, : new - 1]])[None]
    index = np.concatenate([batch.vision_index[row, :n], np.full(new - 1, -1)])[None].astype(np.int32)
    whole = vlc.Batch(text.astype(np.int32), np.array([text.shape[1]], np.int32), index, batch.pixels[row : row + 1])
    full = record(model, params, whole)
    q, k = (np.asarray(x, np.float64)[:, 0] for x in (full.query, full.key))
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    expected = np.zeros((q.shape[0], kv_heads, n))
    for layer in range(q.shape[0]):
        for head in range(q.shape[2]):
            for i in range(n, n + new - 1):
                logits = k[layer, : i + 1, head // group] @ q[layer, i, head] / np.sqrt(q.shape[-1])
                weights = np.exp(logits - logits.max())
                expected[layer, head // group] += (weights / weights.sum())[:n] / group
    np.testing.assert_allclose(attention[:, row, :, :n], expected, atol=1e-5)
    assert np.all(np.asarray(attention)[:, row, :, n:] == 0)


def test_the_oracle_keeps_what_is_needed_most(setting):
    recording, attention = setting[3], setting[5]
    shown = with_answer_attention(recording, attention)
    states = {policy.name: compressed(setting, policy, shown)[1] for policy in (oracle(0.2), oracle_by_mass(0.2))}
    random = compressed(setting, vlc.RandomEviction(0.2))[1]
    equal, mass, chance = (measure(state, attention) for state in (states["oracle"], states["oracle_by_mass"], random))
    # The last token is always kept, needed or not.
    count = np.asarray(equal.kept).min()
    assert np.all(np.asarray(equal.hits) >= 1 - 1 / count)
    assert np.all(np.asarray(equal.mass) >= np.asarray(chance.mass))
    assert np.mean(equal.mass) > 1.1 * np.mean(chance.mass)  # attention of a random model is nearly even
    np.testing.assert_array_equal(np.sum(equal.kept, axis=1), np.sum(mass.kept, axis=1))


def test_all_of_the_cache_is_the_full_cache(setting):
    _, _, batch, recording, out, attention = setting
    shown = with_answer_attention(recording, attention)
    (tokens, _), state = replayed(setting, oracle(1.0), shown)
    np.testing.assert_array_equal(tokens, out.tokens)
    all_held = measure(state, attention)
    np.testing.assert_allclose(all_held.mass, 1, atol=1e-6)
    np.testing.assert_array_equal(all_held.hits, 1)
    np.testing.assert_array_equal(all_held.kept, np.repeat(batch.lengths[:, None], 3, axis=1))


def test_measures_by_hand(setting):
    """Mass and hits of a made-up attention, counted from the kept positions."""
    _, _, batch, *_ = setting
    _, state = compressed(setting, vlc.VLCache(0.2))
    rng = np.random.default_rng(0)
    attention = rng.random((3, batch.size, 2, batch.length)).astype(np.float32)
    attention *= np.arange(batch.length) < batch.lengths[:, None, None]
    measured = measure(state, jnp.asarray(attention))
    for row in range(batch.size):
        mass, hits = [], []
        for layer in range(3):
            for head in range(2):
                kept = np.asarray(state.kept_positions(layer))[row, head]
                kept = kept[kept >= 0]
                scores = attention[layer, row, head]
                mass.append(scores[kept].sum() / scores.sum())
                best = np.argsort(-scores, kind="stable")[: len(kept)]
                hits.append(len(set(best) & set(kept)) / len(kept))
        assert float(measured.mass[row]) == pytest.approx(np.mean(mass), abs=1e-5)
        assert float(measured.hits[row]) == pytest.approx(np.mean(hits), abs=1e-5)


def test_answers_of_one_token_have_nothing_to_hold(setting):
    *_, attention = setting
    _, state = compressed(setting, vlc.VLCache(0.2))
    measured = measure(state, jnp.zeros_like(attention))
    assert np.all(np.isnan(measured.mass))
    assert np.all(np.isnan(measured.hits))


def test_every_policy_takes_part_at_every_budget():
    from vlcache_jax.policies import METHODS

    names = [method.name for method in all_methods()]
    assert {name for name in METHODS if name != FULL} <= set(names)
    assert {"vl_cache_shared", "vl_cache_grid", "vl_cache_uniform", "snap_kv_shared", "oracle", "random"} <= set(names)
    assert len(names) == len(set(names))
    for method in all_methods():
        for budget in BUDGETS[:-1]:
            policy = method.policy(budget, grid_side=16)
            assert policy == method.policy(budget, grid_side=16)
            assert hash(policy) == hash(method.policy(budget, grid_side=16))
    assert Method("snap_kv").policy(0.01, 16).recent == vlc.Window(32)
    assert Method("vl_cache_uniform").policy(0.1, 16).allocate == vlc.SnapKV(0.1).allocate
    assert Method("vl_cache_grid").policy(0.1, 16) == vlc.VLCache(0.1, pool=3, pooling="max", grid_side=16)
    assert Method("snap_kv,window=8").policy(0.1, 16) == vlc.SnapKV(0.1, window=8)
    assert choose_methods(["h2o", "snap_kv,window=8"]) == [Method("h2o"), Method("snap_kv,window=8")]
    with pytest.raises(PolicyError):
        Method("vl_cache").policy(2.5, 16)


def test_scores_of_tasks():
    assert score("documents", ["water 3349", "tax 3349", "water 12"], ["water 3349"] * 3).tolist() == [1, 1, 0]
    assert score("documents", ["water 3340"], ["water 3349"]).tolist() == [0.75]
    assert score("prices", ["apple 9 + cup 7 = 16", "apple 9 + cup 7 = 15"], ["apple 8 + cup 8 = 16"] * 2).tolist() == [
        1,
        0,
    ]
    assert score("scenes", ["red ring", "blue star"], ["red ring", "green star"])[0] > 1
    assert score("counts", ["1, 2", "1, 0"], ["1, 2", "1, 1"]).tolist() == [1, 0]
    assert [score_name(task) for task in ("documents", "scenes", "counts")] == ["ANLS", "CIDEr", "accuracy"]


def made_up(task, method, budget, samples=40, seed=0):
    rng = np.random.default_rng(abs(hash((task, method, budget, seed))) % 2**32)
    exact = (rng.random(samples) < budget**0.3).astype(float)
    mass = rng.random(samples)
    return Result(
        key=Key(task, method, budget, "known"),
        exact=exact,
        score=exact * 0.75,
        agrees=exact,
        mass=np.where(np.arange(samples) == 3, np.nan, mass),
        hits=mass,
        kept=np.full(samples, budget),
        layers=np.full(6, budget),
        density=rng.random(6) / 10,
        state_bytes=1000,
        full_bytes=20_000,
        seconds=1.234,
    )


STUDY = {"samples": 40, "checkpoint": "abc"}


def test_results_survive_a_kill(tmp_path):
    file = ResultFile(tmp_path, STUDY)
    file.add_run({"date": "2026-11-21"})
    results = [made_up("documents", method, budget) for method in ("vl_cache", "h2o") for budget in (0.1, 0.2)]
    for result in results:
        file.add(result)
    path = tmp_path / FILE
    size = path.stat().st_size
    assert size < 4 * 1400
    with path.open("a", encoding="utf-8") as lines:  # a write that was killed
        lines.write('{"kind":"result","task":"docu')

    with pytest.warns(UserWarning, match=r"results.jsonl, line 7 was cut off .* measured again"):
        again = ResultFile(tmp_path, STUDY)
    assert path.stat().st_size == size
    assert list(again.results) == [result.key for result in results]
    for result in results:
        read = again.results[result.key]
        np.testing.assert_array_equal(read.exact, result.exact)
        np.testing.assert_allclose(read.score, result.score, atol=5e-3)
        np.testing.assert_allclose(read.mass, result.mass, atol=5e-3)
        np.testing.assert_allclose(read.kept, result.kept, atol=5e-5)
        assert (read.state_bytes, read.full_bytes) == (1000, 20_000)
    again.add(made_up("documents", "tova", 0.1))
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["study", "run", *["result"] * 5]


def test_results_of_another_study_are_refused(tmp_path):
    ResultFile(tmp_path, STUDY)
    with pytest.raises(InputError, match=r"samples=40, not 41.*choose another --output"):
        ResultFile(tmp_path, {**STUDY, "samples": 41})
    (tmp_path / FILE).write_text('{"kind":"study","samples":40,"checkpoint":"abc"}\nnonsense\n')
    with pytest.raises(InputError, match="line 2 is no result"):
        ResultFile(tmp_path, STUDY)


def test_tables_and_pictures(tmp_path):
    file = ResultFile(tmp_path, STUDY)
    methods = ["vl_cache", "vl_cache_shared", "vl_cache_grid", "h2o", "random", "oracle_by_mass"]
    for task in ("documents", "scenes"):
        file.add(made_up(task, FULL, 1.0))
        for method in methods:
            for budget in (0.01, 0.1):
                file.add(made_up(task, method, budget))
        for method in methods:
            file.add_kept(task, method, 0.1, layers=["09" * 128] * 6, text=[1.0] * 6, answer="water 1")
    table = Table(file)
    assert table.tasks == ["documents", "scenes"]
    assert table.methods == methods
    assert table.budgets == [0.01, 0.1, 1.0]
    full, some = table.full("documents"), table.result("documents", "h2o", 0.1)
    assert table.relative("documents", "h2o", 0.1) == pytest.approx(some.score.mean() / full.score.mean())
    assert table.value("documents", "h2o", 1.0) == pytest.approx(full.score.mean())
    text = tables(table)
    from vlcache_jax.evaluation.metrics import bootstrap_interval

    _, low, high = bootstrap_interval(100 * (some.score - full.score))
    assert f"{100 * some.score.mean():.1f}" in text
    assert f"{low:+.1f} to {high:+.1f}" in text
    assert "| H2O |" in text
    written = {path.name for path in write_pages(file, tmp_path)}
    assert written >= {"tables.md", "scores.png", "all_scores.png", "variants.png", "layers.png", "kept_documents.png"}


def test_a_picture_of_kept_tokens_is_coloured_where_they_are():
    drawn = {"vl_cache": "9" + "0" * 255, "h2o": "0" * 256}
    lines = {method: {"layers": [layer] * 2, "answer": ""} for method, layer in drawn.items()}
    pixels = np.asarray(draw_kept("documents", 0.1, lines)).astype(int)
    coloured = (pixels[..., 0] - pixels[..., 2]) > 60
    assert coloured.any()
    middle = pixels.shape[1] // 2
    assert coloured[:, :middle].sum() > 5 * coloured[:, middle:].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "argument --samples: '0' is out of range"),
        (["--methods", "vl_cash"], "'vl_cash' does not exist: did you mean 'vl_cache'?"),
        (["--methods", "vl_cache,heds=shared"], "has no option 'heds': did you mean 'heads'?"),
        (["--methods", "vl_cache:0.1,heads=shared"], "'budget' is given twice"),
        (["--tasks", "document"], "'document' does not exist: did you mean 'documents'?"),
        (["--tasks", "scenes", "scenes"], "'scenes' is named twice"),
        (["--budgets", "10"], "10 is out of range: give fractions"),
        (["--budgets", "0.1", "0.1"], "0.1 is named twice"),
        (["--assets", "nowhere"], "no demo checkpoint"),
    ],
)
def test_bad_input_is_refused_at_once(arguments, message, tmp_path, capsys):
    assert main(["study", "--output", str(tmp_path / "out"), *arguments]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("vlcache-jax: error: ")
    assert all(line.startswith("[") for line in progress)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(["study", "--output", str(tmp_path / "out")]) == 2
    assert "is a file: give a folder" in capsys.readouterr().err


def test_choose():
    assert choose("methods", None, ["a", "b"]) == ["a", "b"]
    assert choose("methods", ["b"], ["a", "b"]) == ["b"]


@pytest.mark.thorough
def test_the_command_runs_and_goes_on(tmp_path, capsys):
    """The shipped checkpoint; a second call measures only what is new, and its answers are those of `generate`."""
    folder = tmp_path / "out"
    command = ["study", "--output", str(folder), "--samples", "3", "--batch", "2", "--tasks", "documents"]
    command += ["--no-compilation-cache", "--methods", "vl_cache", "oracle", "--budgets", "0.1"]
    assert main([*command[:-4], "vl_cache", "--budgets", "0.1"]) == 0
    assert "vl_cache 0.1: exact match" in capsys.readouterr().err
    before = (folder / FILE).read_text()
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "oracle 0.1: exact match" in error
    assert "vl_cache 0.1: exact match" not in error
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert (folder / FILE).read_text().startswith(before)
    results = {line["method"]: line for line in lines if line["kind"] == "result"}
    assert set(results) == {FULL, "vl_cache", "oracle"}
    assert all(len(line["exact"]) == 3 for line in results.values())
    assert results[FULL]["agrees"] == "111"
    assert results[FULL]["mass"] == 100
    assert results["oracle"]["hits"] != results["vl_cache"]["hits"]
    np.testing.assert_allclose(np.array(results["vl_cache"]["kept"]) / 10_000, 0.1, atol=0.005)
    assert results["vl_cache"]["state_bytes"] < 0.2 * results["vl_cache"]["full_bytes"]
    for line in lines[1:2]:
        assert line["kind"] == "run"
        assert {"date", "versions", "device"} <= set(line)
    assert (folder / "tables.md").exists()
    jax.clear_caches()


def asked_batch():
    """Prompts whose image ends at the same place, with questions of different lengths."""
    rng = np.random.default_rng(3)
    lengths = np.array([30, 24, 27], np.int32)
    tokens = rng.integers(6, 64, (3, 32)).astype(np.int32)
    index = np.full((3, 32), -1, np.int32)
    index[:, 3:19] = np.arange(16)
    tokens[index >= 0] = 5
    tokens[np.arange(32) >= lengths[:, None]] = 0
    return vlc.Batch(tokens, lengths, index, rng.normal(size=(3, 1, 16, 16, 3)).astype(np.float32))


def test_prompts_are_split_behind_their_images():
    batch = asked_batch()
    first, question = split(batch)
    assert first.length == 19
    assert first.lengths.tolist() == [19, 19, 19]
    assert question.lengths.tolist() == [11, 5, 8]
    for row, n in enumerate(batch.lengths):
        whole = [*first.tokens[row], *np.asarray(question.tokens)[row, : int(question.lengths[row])]]
        assert whole == batch.tokens[row, :n].tolist()
    with pytest.raises(ValueError, match="must agree"):
        images_end(ragged_batch(rows=2))


@pytest.mark.thorough
def test_all_of_a_context_answers_as_the_full_cache():
    model, params = tiny_llava()
    batch = asked_batch()
    out = vlc.generate(model, params, batch, vlc.FullCache(), NEW)
    arguments = (Replay(model), params, batch, record(model, params, batch))
    tokens, lengths, stores, _ = answer_before(*arguments, vlc.FullCache(), NEW)
    np.testing.assert_array_equal(tokens, out.tokens)
    np.testing.assert_array_equal(lengths, out.lengths)
    some = answer_before(*arguments, vlc.KeyDifference(0.3), NEW)[2]
    end = np.full(3, 19)
    whole = np.ones((3, 3, 2, 19), np.float32)
    assert np.all(held(stores, end, whole).kept == 19)
    np.testing.assert_allclose(np.mean(held(some, end, whole).kept, axis=1) / 19, 0.3, atol=0.02)
