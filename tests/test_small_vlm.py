"""The scripts of the small VLM (benchmarks/pretrained), at the demo model's size; it sees strips as pages."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, demo_assets

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "pretrained"))
import attention
import strips
import vlm_answers

FOLDER = demo_assets(None) / MODEL


def strip(*questions):
    return strips.Strip(np.zeros((256, 256, 3), np.uint8), [], list(questions))


def test_right_is_the_whole_value_and_begun_its_first_digits():
    asked = vlm_answers.Asked(strip(("What is the total?", "total 4517")))
    assert all(asked.right(said) for said in ("total 4517", " total 4517\n"))
    assert not any(asked.right(said) for said in ("total 4516", "total 45", "total 45170"))
    assert all(asked.begun(said, 1) for said in ("total 4417", "total 4"))
    assert not any(asked.begun(said, 1) for said in ("total 5417", "code 4517"))
    assert [asked.begun("total 4528", digits) for digits in (1, 2, 3, 4)] == [True, True, False, False]


def test_policies_are_those_of_both_budgets_and_variants():
    found = vlm_answers.policies()
    assert next(iter(found)) == vlm_answers.FULL
    assert len(found) == 7 + 2 * len(vlm_answers.EVICTING) + len(vlm_answers.variants())
    assert found["its scores, equal layers 0.1"] != found["VL-Cache 0.1"] == vlc.VLCache(0.1)


def run(output, samples):
    vlm_answers.main([str(FOLDER), "--output", str(output), "--samples", str(samples), "--rows", "2"])
    return [json.loads(line) for line in output.read_text().splitlines()]


def two_policies(monkeypatch):
    found = {name: vlm_answers.policies()[name] for name in (vlm_answers.FULL, "SnapKV 0.1")}
    monkeypatch.setattr(vlm_answers, "policies", lambda: found)
    return list(found)


def test_answers_go_on_where_they_stopped(tmp_path, capsys, monkeypatch):
    """What a policy answers is made up here: the full cache the truth, SnapKV its first digit only."""
    names = two_policies(monkeypatch)

    def measured(vlm, prompts, policy):
        full, wanted = policy.name == vlm_answers.FULL, [sample.answer for sample in prompts.samples]
        assert prompts.batch.size == 2
        return {
            "right": "01"[full] * len(wanted),
            "agrees": "01"[full] * len(wanted),
            "kl": [0.0 if full else 2.0] * len(wanted),
            "log_likelihood": [-1.0] * len(wanted),
            "bytes": 1.0 if full else 0.1,
            "buffers": 1.0 if full else 0.15,
            "seconds": 0.0,
            "answers": [text if full else f"{text[:-3]}xxx" for text in wanted],
        }

    monkeypatch.setattr(vlm_answers, "measure", measured)
    monkeypatch.setattr(
        vlm_answers, "answered", lambda vlm, samples, batch, repeated: SimpleNamespace(samples=samples, batch=batch)
    )
    before = run(tmp_path / "answers.jsonl", 2)
    capsys.readouterr()
    lines = run(tmp_path / "answers.jsonl", 3)
    assert lines[:2] == before
    assert [(x["policy"], x["first"]) for x in lines] == [(name, first) for first in (0, 2) for name in names]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| full_cache | 100 | 100 | 100 % of 3 (+0 to +0) | 100, 100, 100, 100 | 100 | 0.0000 (0.0000 to 0.0000) |",
        "| SnapKV 0.1 | 10 | 15 | 0 % of 3 (-100 to -100) | 100, 0, 0, 0 | 0 | 2.0000 (2.0000 to 2.0000) |",
    ]


@pytest.mark.thorough
def test_answers_are_measured(tmp_path, monkeypatch):
    two_policies(monkeypatch)
    full, snap = run(tmp_path / "answers.jsonl", 2)
    assert (full["bytes"], full["buffers"], full["agrees"], full["kl"]) == (1.0, 1.0, "11", [0, 0])
    assert snap["bytes"] == pytest.approx(0.1, abs=0.01)
    assert snap["bytes"] <= snap["buffers"] < 0.3
    assert all(x > 0 for x in snap["kl"])
    assert len(snap["answers"]) == 2


def test_attention_of_both_models(tmp_path):
    found = attention.pictures(FOLDER, 2)
    for values in found.values():
        for name, value in values.items():
            assert value.shape == (6,), name
            assert np.all((value >= 0) & (value <= 1 + 1e-5)), name
        assert np.all(values["least"] <= values["heads"])
        assert np.all(values["heads"] <= values["most"])
        assert np.all(values["held 0.1"] <= values["best 0.1"] + 1e-6)
    attention.plot(found, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
