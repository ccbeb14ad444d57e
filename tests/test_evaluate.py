"""`vlcache-jax evaluate` and `report`: a line for each sample, whatever happens."""

import json
import resource

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.evaluation.metrics import bleu, cider_d, rouge_l
from vlcache_jax.evaluation.report import rows, summarise
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.evaluation.samples import read_samples
from vlcache_jax.evaluation.speed import speed

POLICY, OPTIONS = "vl_cache:0.3", ["--rows", "3", "--dtype", "float32", "--no-compilation-cache"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_llava(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fourteen samples, of whose images one is missing, one none and one a bomb; answers that the model hits."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(14):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append({"id": f"s{i}", "images": [f"{i}.png"], "question": f"w{i} w2", "answers": ["w1"], "page": i})
    lines[3]["images"] = ["missing.png"]
    (folder / "5.png").write_bytes(b"no image")
    Image.new("1", (10_100, 10_000)).save(folder / "13.png")
    lines[7] |= {"images": [], "max_new_tokens": 2}
    lines[8] |= {"choices": ["red", "green"], "answers": ["B"]}
    del lines[9]["answers"]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments):
    assert main([str(x) for x in arguments]) == 0


def evaluation(checkpoint, data, out, *arguments):
    run("evaluate", "--model", checkpoint, "--data", data, "--out", out, "--max-new-tokens", 6, *OPTIONS, *arguments)


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    evaluation(checkpoint, data, out, "--policy", POLICY, "--compare", "full_cache")
    return out


def lines(out, policy=POLICY):
    text = (out / f"{policy.replace(':', '-')}.jsonl").read_text()
    return {line["id"]: line for line in map(json.loads, text.splitlines())}


def table(out, capsys, *arguments):
    capsys.readouterr()
    run("report", out, *arguments)
    return capsys.readouterr().out.replace(str(out), "RUN")


def test_every_sample_has_a_line_and_answers_are_those_of_generate(checkpoint, data, finished):
    found = lines(finished)
    assert sorted(found) == sorted(f"s{i}" for i in range(14))
    assert {key for key, line in found.items() if line["status"] == "failed"} == {"s3", "s5", "s13"}
    assert "missing.png" in found["s3"]["reason"]
    assert "too many pixels" in found["s13"]["reason"]
    vlm = vlc.load(checkpoint, dtype="float32")
    for key in ("s0", "s7", "s8", "s11"):
        line = found[key]
        sample = next(sample for sample in read_samples([data]) if sample.id == key)
        text = sample.question
        if sample.choices:
            text += "\nA. red\nB. green\nAnswer with the option's letter from the given choices directly."
        parts = [*[{"type": "image", "image": path} for path in sample.images], {"type": "text", "text": text}]
        batch = vlm.processor.chat([[{"role": "user", "content": parts}]])
        out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.3), sample.max_new_tokens or 6)
        assert line["answer"] == vlm.processor.decode(out)[0].strip()
        assert line["tokens"] == int(out.lengths[0])
        assert line["page"] == int(key[1:])
        assert line["kept_fraction"] == pytest.approx(float(out.report.kept_fraction[0]))
    assert found["s9"]["score"] is None


def test_the_table(finished, capsys):
    found = json.loads(table(finished, capsys, "--json", "--compare", "full_cache"))["RUN"]
    full, compressed = found
    assert [full["policy"], compressed["policy"]] == ["full_cache", POLICY]
    assert (compressed["samples"], compressed["failed"], compressed["scored"]) == (14, 3, 13)
    scores = [line["score"] or 0 for line in lines(finished).values() if line["answers"]]
    assert compressed["score"][0] == pytest.approx(np.mean(scores))
    assert full["compared"] is None
    assert compressed["compared"] == "full_cache"
    pairs = [(line, lines(finished, "full_cache")[key]) for key, line in lines(finished).items()]
    same = [a["answer"].lower().split() == b["answer"].lower().split() for a, b in pairs if a["status"] == "ok"]
    assert compressed["agreement"] == pytest.approx(np.mean(same))
    assert "| vl_cache:0.3 |" in table(finished, capsys, "--markdown")


@pytest.mark.thorough
def test_divergence(checkpoint, data, finished, tmp_path, capsys):
    """Along the full cache's answers, which ended early, as `divergence` finds it; a run that was cut goes on."""
    for file in finished.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    early = [line | {"token_ids": line.get("token_ids", [])[:5]} for line in lines(tmp_path, "full_cache").values()]
    (tmp_path / "full_cache.jsonl").write_text("".join(json.dumps(line) + "\n" for line in early))
    arguments = ["--policy", POLICY, "--compare", "full_cache", "--divergence"]
    evaluation(checkpoint, data, tmp_path, *arguments)
    path = tmp_path / "vl_cache-0.3.divergence.jsonl"
    whole = lines_of_whole(path)
    assert sorted(whole) == sorted(key for key, line in lines(finished).items() if line["status"] == "ok")
    vlm = vlc.load(checkpoint, dtype="float32")
    sample = next(read_samples([data]))
    parts = [{"type": "image", "image": sample.images[0]}, {"type": "text", "text": sample.question}]
    batch = vlm.processor.chat([[{"role": "user", "content": parts}]])
    contexts = [vlc.compress(vlm.model, vlm.params, batch, policy) for policy in (vlc.FullCache(), vlc.VLCache(0.3))]
    found = vlc.divergence(*contexts, vlc.answer(contexts[0], max_new_tokens=5))
    assert whole["s0"]["kl"] == pytest.approx(float(found.mean[0]), abs=1e-5)
    assert whole["s0"]["same_next"] == pytest.approx(float(found.agreement[0]), abs=1e-5)
    (full, compressed) = json.loads(table(tmp_path, capsys, "--json", "--compare", "full_cache"))["RUN"]
    assert full["divergence"] is None
    assert compressed["divergence"][0] == pytest.approx(np.mean([line["kl"] for line in whole.values()]))
    assert compressed["same_next"] == pytest.approx(np.mean([line["same_next"] for line in whole.values()]))
    expected = table(tmp_path, capsys, "--compare", "full_cache")
    assert "same next token" in expected
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    evaluation(checkpoint, data, tmp_path, *arguments)
    assert lines_of_whole(path).keys() == whole.keys()
    assert table(tmp_path, capsys, "--compare", "full_cache") == expected


def test_speed_and_plots(finished, tmp_path, capsys):
    folder = RunFolder.open(finished)
    fast = speed(folder, POLICY)
    (line,) = (line for part in folder.starts(POLICY) for line in part if "stats" in line)
    assert fast.samples_per_second == pytest.approx(14 / line["stats"]["seconds"])
    assert (fast.rows, fast.devices, fast.versions["jax"]) == (3, "8 x cpu", jax.__version__)
    assert 0 < fast.state_bytes < speed(folder, "full_cache").state_bytes
    text = table(finished, capsys, "--speed", "--plots", tmp_path / "plots", "--compare", "full_cache")
    assert "samples/s" in text
    for name in ("scores.png", "throughput.png"):
        with Image.open(tmp_path / "plots" / name) as picture:
            assert min(picture.size) > 100
    found = json.loads(table(finished, capsys, "--json", "--speed"))["RUN"]
    assert found[1]["speed"]["tokens_per_second"] == pytest.approx(fast.tokens_per_second)


def test_speeds_of_parts_add_up(tmp_path):
    """Those that ran at the same time; starts of one part ran one after another, and killed ones do not count."""
    folder = RunFolder.begin(tmp_path, {"metric": "anls"})
    line = {"device": "cpu", "devices": 1, "jax": "1", "vlcache_jax": "2"}
    for part, results, seconds in ((0, 10, 5.0), (0, 20, 5.0), (1, 8, 2.0)):
        own = RunFolder.begin(tmp_path, folder.settings, f"part-{part}-of-2")
        own.add_start("x", {"sizes": {}})
        own.add_start("x", line | {"stats": {"results": results, "seconds": seconds, "rows": 4, "of_later": 1}})
    assert speed(folder, "x").samples_per_second == pytest.approx(30 / 10 + 8 / 2)
    assert (speed(folder, "x").rows, speed(folder, "x").devices) == (8, "2 x cpu")
    assert speed(folder, "y") is None


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_was_cut_anywhere_ends_with_the_same_table(checkpoint, data, finished, tmp_path, capsys, seed):
    rng = np.random.default_rng(seed)
    out = tmp_path / "run"
    out.mkdir()
    for file in finished.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    policy = POLICY if seed < 2 else "full_cache"
    name = f"{policy.replace(':', '-')}.jsonl"
    whole = (finished / name).read_bytes()
    (out / name).write_bytes(whole[: int(rng.integers(len(whole) // 4, len(whole)))])
    evaluation(checkpoint, data, out, "--policy", POLICY, "--compare", "full_cache")
    assert {key: line["answer"] for key, line in lines_of_whole(out / name).items()} == {
        key: line["answer"] for key, line in lines(finished, policy).items()
    }
    assert table(out, capsys, "--compare", "full_cache") == table(finished, capsys, "--compare", "full_cache")


def lines_of_whole(path):
    """By id, without what a killed program left unfinished; none twice."""
    found = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        assert line["id"] not in found
        found[line["id"]] = line
    return found


def test_two_programs_share_the_samples(checkpoint, data, finished, tmp_path, capsys):
    """Each has its part, one of them on a mesh; a sample that one has answered is not answered by another one."""
    for share, more in (("0/2", []), ("1/2", ["--mesh", "data=4,model=2", "--rows", 4])):
        evaluation(checkpoint, data, tmp_path, "--policy", POLICY, "--share", share, *more)
    parts = [lines(tmp_path / f"part-{i}-of-2") for i in range(2)]
    assert [len(part) for part in parts] == [7, 7]
    assert {key: line["answer"] for part in parts for key, line in part.items()} == {
        key: line["answer"] for key, line in lines(finished).items()
    }
    evaluation(checkpoint, data, tmp_path, "--policy", POLICY)
    assert not list(tmp_path.glob("vl_cache*"))
    assert table(tmp_path, capsys).splitlines()[3:] == [
        line for line in table(finished, capsys).splitlines()[3:] if POLICY in line
    ]


def test_another_evaluation_is_refused_with_the_differences(checkpoint, data, finished, capsys):
    arguments = ["evaluate", "--model", checkpoint, "--data", data, "--out", finished, "--max-new-tokens", 7, *OPTIONS]
    assert main([str(x) for x in arguments]) == 2
    assert "holds another evaluation (max_new_tokens was 6, now 7)" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_what_was_finished(checkpoint, data, finished, tmp_path, capsys):
    """No file may grow beyond some bytes, so that a line is written in part; with more room the run goes on."""
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
        arguments = ["evaluate", "--model", checkpoint, "--data", data, "--out", out, "--max-new-tokens", 6, *OPTIONS]
        status = main([*map(str, arguments), "--policy", POLICY])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert "vl_cache-0.3.jsonl' cannot be written: [Errno 27] File too large" in capsys.readouterr().err
    whole = lines_of_whole(out / "vl_cache-0.3.jsonl")
    assert 0 < len(whole) < 14
    assert f" {len(whole)}  " in table(out, capsys)
    evaluation(checkpoint, data, out, "--policy", POLICY, "--compare", "full_cache")
    assert table(out, capsys, "--compare", "full_cache") == table(finished, capsys, "--compare", "full_cache")


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.jsonl", ""), ("x.tsv", "question\n"), ("x.parquet", {"question": []}), ("x.tsv", "")],
)
def test_files_without_a_sample(checkpoint, tmp_path, capsys, name, text):
    path = tmp_path / name
    if isinstance(text, str):
        path.write_text(text)
    else:
        pyarrow.parquet.write_table(pyarrow.table(text), path)
    assert main(["evaluate", "--model", str(checkpoint), "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "x." in (told := capsys.readouterr().err)
    assert "there are no samples" in told or "no column question" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-file.jsonl"], "names no file"),
        (["--task", "vqa"], "task 'vqa' is not known"),
        (["--metric", "f1"], "metric 'f1' is not known"),
        (["--policy", "nothing"], "nothing"),
        (["--divergence"], "--divergence needs a policy to diverge from"),
        (["--share", "2/2"], "--share '2/2' is not of the form I/N"),
        (["--share", "0/2", "--distributed"], "give one of them"),
        (["--distributed", "node0,0/2"], "is not of the form HOST:PORT,I/N"),
        (["--distributed", "node0:4000,2/2"], "--distributed '2/2' is not of the form I/N"),
        (["--distributed"], "JAX's processes cannot be joined"),
        (["--mesh", "data=3"], "--mesh 'data=3' is of 3 devices: JAX sees 8"),
    ],
)
def test_bad_arguments_before_anything_is_loaded(data, tmp_path, capsys, arguments, message):
    start = ["evaluate", "--model", str(tmp_path / "none"), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*start, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_an_evaluation(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_captions_are_scored_together(tmp_path):
    """CIDEr-D needs all references at once: the report scores what the lines hold."""
    folder = RunFolder.begin(tmp_path, {"metric": "cider_d"})
    said = {"a": "a man rides a horse", "b": "two dogs play", "c": ""}
    right = {"a": ["a man rides a horse", "a rider"], "b": ["two cats sleep"], "c": ["a red bus"]}
    for key in ("b", "a", "c"):
        status = "ok" if said[key] else "failed"
        line = {"id": key, "answer": said[key], "answers": right[key], "score": None, "status": status, "tokens": 3}
        folder.add("full_cache", line | {"kept_fraction": 1.0})
    (summary,) = summarise(RunFolder.open(tmp_path))
    expected = cider_d(list(said.values()), list(right.values()))
    assert summary.score.mean == pytest.approx(expected.mean())
    assert summary.also == {
        "bleu_4": bleu(list(said.values()), list(right.values())),
        "rouge_l": pytest.approx(np.mean([rouge_l(said[key], right[key]) for key in said])),
    }
    assert "bleu_4" in rows([summary])[0]
    assert (summary.samples, summary.failed, summary.scored) == (3, 1, 3)
