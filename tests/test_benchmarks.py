"""The benchmark scripts run, at sizes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch  # noqa: F401  (decode_speed.py compares with it: not part of --core)

import vlcache_jax as vlc

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(tmp_path: Path, script: str, *options: str) -> dict:
    record = tmp_path / "record.json"
    command = [sys.executable, str(BENCHMARKS / script), *options, "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|" in done.stdout
    result = json.loads(record.read_text())
    assert result["machine"]["cores"] > 0
    assert result["versions"]["jax"] == jax.__version__
    assert str(Path.home()) not in record.read_text()
    return result


@pytest.mark.thorough
def test_decode_speed(tmp_path):
    options = ["--shape", "smoke", "--batch", "2", "--length", "32", "--steps", "4", "--repeats", "1"]
    result = run(tmp_path, "decode_speed.py", *options, "--layout", "apart")
    assert [row["policy"] for row in result["rows"]] == ["full_cache", "vl_cache"]
    assert all(row["speed_up"]["median"] > 0 for row in result["rows"])
    assert all(row["same_tokens"] == 1 for row in result["rows"] if row["policy"] == "full_cache")


@pytest.mark.thorough
def test_prefill_overhead(tmp_path):
    result = run(
        tmp_path, "prefill_overhead.py", "--shape", "smoke", "--length", "64", "--scored", "8", "--repeats", "1"
    )
    assert all(row["ratio"]["median"] > 0 for row in result["rows"])


@pytest.mark.thorough
def test_decode_attention_cpu(tmp_path):
    options = ["--model", "qwen2-0.5b", "--batch", "1", "--tokens", "256", "--repeats", "1", "--calls", "1"]
    result = run(tmp_path, "decode_attention_cpu.py", *options)
    assert result["settings"]["difference"] < 1e-5
    assert all(row["to_all"]["median"] > 0 for row in result["rows"])


@pytest.mark.thorough
def test_rollouts(tmp_path):
    options = [
        "--shape",
        "smoke",
        "--length",
        "32",
        "--samples",
        "2",
        "--steps",
        "4",
        "--repeats",
        "1",
        "--budget",
        "0.5",
    ]
    result = run(tmp_path, "rollouts.py", *options)
    assert [row["side"] for row in result["rows"]] == ["separate", "one prefill", "with both log-probabilities"]


@pytest.mark.thorough
def test_engine(tmp_path):
    options = ["--shape", "smoke", "--length", "448", "--new-tokens", "8", "--requests", "12", "--full-rows", "4"]
    full, compressed, reference = run(tmp_path, "engine.py", *options, "--transformers")["rows"]
    assert 2 <= full["rows"] < compressed["rows"]
    assert reference["same_tokens"] == 1
    for row in (full, compressed):
        assert row["compilations"] <= row["programs"]  # some were compiled to find the number of bytes
        assert 0 < row["padding_share"] < 0.25


@pytest.mark.thorough
def test_a_thousand_mixed_requests(tmp_path):
    """Of six tasks, one image and two: few programs, and a host that keeps a slow device busy."""
    (found,) = run(tmp_path, "engine_mixed.py", "--requests", "1000", "--fake-ms", "20")["rows"]
    assert len(found["buckets"]) <= 6
    assert {bucket[1] for bucket in found["buckets"]} == {1, 2}
    assert found["programs"] == found["compilations"] <= 2 * len(found["buckets"]) + 3
    assert found["idle_share"] <= 0.1


def test_state_bytes(tmp_path):
    result = run(tmp_path, "state_bytes.py", "--lengths", "1024", "--budgets", "0.1", "--shapes", "7b")
    assert [row["ratio"] <= 0.13 for row in result["rows"]] == [True]


@pytest.mark.thorough
def test_compile_count(tmp_path):
    result = run(tmp_path, "compile_count.py", "--shape", "smoke", "--bucket", "64", "--prompts", "5")
    assert result["rows"]
    for row in result["rows"]:
        assert (row["prefill"], row["decode"], row["other"]) == (1, 1, 0)


@pytest.mark.thorough
def test_decode_step_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    sizes = ["--shape", "smoke", "--shapes", "2x40", "--scored", "8", "--steps", "3", "--repeats", "1"]
    copy = ["--copy-bytes", "4096", "--rounds", "2"]
    result = run(tmp_path, "gpu/decode_step.py", *sizes, *copy, "--decode-attention", "xla_wide", "pallas_gpu")
    full, compressed = (row for row in result["rows"] if row["name"] != "copy")
    decoder = harness.Llava(harness.SHAPES["smoke"]).abstract_params()["decoder"]
    weights = sum(2 * x.size for name in decoder.keys() - {"embed_tokens"} for x in jax.tree.leaves(decoder[name]))
    prompt = 2 * 2 * 2 * 8 * 2 * 2  # rows, layers, KV heads, head size, keys and values, bytes
    assert full["bytes"] == weights + prompt * 40 + prompt * 3 // 2
    assert weights < compressed["bytes"] < weights + prompt * 10
    assert all("pallas_gpu" in name for name in result["settings"]["failures"])


@pytest.mark.thorough
def test_correctness_on_a_gpu(tmp_path):
    cases = ["--decode", "1,2,4,2,1,64,64", "--prefill", "1,40,4,2,16,7", "--dtypes", "float32"]
    result = run(tmp_path, "gpu/correctness.py", *cases)
    numbers = [row["result"] for row in result["rows"] if row["implementation"] not in ("pallas_gpu", "cudnn")]
    assert len(numbers) == 6
    assert max(numbers) < 1e-4


@pytest.mark.thorough
def test_kernels_of_a_gpu(tmp_path):
    options = ["--shape", "smoke", "--shapes", "2x40", "--scored", "8", "--steps", "3"]
    result = run(tmp_path, "gpu/kernels.py", *options)
    assert [row["name"].split(" ", 1)[1] for row in result["rows"]] == [
        f"{policy} {part}" for policy in ("full_cache", "vl_cache") for part in ("prefill", "decode step")
    ]
    assert all(row["seconds"] > 0 == row["launches"] for row in result["rows"])  # a CPU has no kernels


@pytest.mark.thorough
def test_the_papers_table(tmp_path):
    options = ["--shape", "smoke", "--cases", "2x40", "1x30", "--steps", "3", "--repeats", "1"]
    result = run(tmp_path, "gpu/paper_table.py", *options, "--sides", "vl_cache", "transformers", "--budget", "0.5")
    assert [row["side"] for row in result["rows"]] == ["vl_cache", "transformers"] * 2
    assert all(0 < row["prefill"]["median"] < row["end_to_end"]["median"] for row in result["rows"])
    failing = run(tmp_path, "gpu/paper_table.py", *options[:2], "--cases", "1x3", "--sides", "vl_cache")
    assert "too few" in failing["rows"][0]["failed"]


@pytest.mark.parametrize("policy", [pytest.param(vlc.FullCache(), marks=pytest.mark.thorough), vlc.VLCache(budget=0.2)])
def test_the_layout_for_cpus_generates_the_same_tokens(policy, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    from vlcache_jax.models.decoder.layout import relaid

    config = harness.SHAPES["smoke"]
    model = harness.Llava(config)
    params = harness.random_params(model)
    batch = harness.random_batch(config, rows=2, length=40)
    laid = [relaid(params, model, layout) for layout in ("stacked", "apart")]
    outs = [vlc.generate(m, p, batch, policy, 8, eos_token_ids=()) for m, p in laid]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_array_equal(outs[0].report.kept, outs[1].report.kept)
    assert len(set(np.asarray(outs[0].tokens).ravel().tolist())) > 1


@pytest.mark.thorough
def test_batch_invariance(tmp_path):
    options = ["--cases", "30", "--policies", "3", "--rows", "5", "--length", "40", "--answers", "5", "--seed", "3"]
    options += ["--progress", str(tmp_path / "progress.jsonl")]
    first = run(tmp_path, "batch_invariance.py", *options)
    assert sum(row["cases"] for row in first["rows"]) == 30
    assert [row["mismatches"] for row in first["rows"]] == [[]] * 3
    again = run(tmp_path, "batch_invariance.py", *options)
    assert again["rows"] == first["rows"]
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3, "what is done is not done again"


@pytest.mark.thorough
def test_pruning(tmp_path):
    options = ["--shape", "smoke", "--images", "2", "--text", "8", "--repeats", "1", "--methods", "feather,vision_zip"]
    rows = run(tmp_path, "pruning.py", *options)["rows"]
    assert [row["pruning"] for row in rows] == ["dense", "feather", "vision_zip"]
    assert all(row["ratio"]["median"] > 0 for row in rows)


@pytest.mark.thorough
def test_sparse_attention(tmp_path):
    options = ["--tokens", "1024", "--kv-heads", "1", "--repeats", "1", "--share", "0.5"]
    dense, given, estimated = run(tmp_path, "sparse_attention.py", *options)["rows"]
    assert dense["ratio"]["median"] == 1
    assert 0.4 < given["share"] < 0.6
    assert 0.4 < estimated["share"] < 0.6
