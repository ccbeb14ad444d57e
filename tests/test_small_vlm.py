"""The scripts of the small VLM (benchmarks/pretrained), at the demo model's size; it sees strips as pages."""

import json
import sys
from pathlib import Path

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


def test_right_is_the_whole_value_and_begun_its_first_digit():
    asked = vlm_answers.Asked(strip(("What is the total?", "total 4517")))
    assert [asked.right(said) for said in ("total 4517", " total 4517\n", "total 4516", "total 45")] == [
        True,
        True,
        False,
        False,
    ]
    assert [asked.begun(said) for said in ("total 4417", "total 4", "total 5417", "code 4517")] == [
        True,
        True,
        False,
        False,
    ]


def test_policies_are_all_of_both_budgets():
    found = vlm_answers.policies()
    assert next(iter(found)) == vlm_answers.FULL
    assert len(found) == 7 + 2 * len(vlm_answers.EVICTING)
    assert found["its scores, equal layers 0.1"] != found["VL-Cache 0.1"] == vlc.VLCache(0.1)


def test_answers_go_on_and_are_compared(tmp_path, capsys, monkeypatch):
    found = {name: vlm_answers.policies()[name] for name in (vlm_answers.FULL, "SnapKV 0.1")}
    monkeypatch.setattr(vlm_answers, "policies", lambda: found)
    output = tmp_path / "answers.jsonl"

    def run(samples):
        vlm_answers.main([str(FOLDER), "--output", str(output), "--samples", str(samples), "--rows", "2"])
        return capsys.readouterr().out

    run(2)
    before = output.read_text().splitlines()
    table = run(3).splitlines()[-4:]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().splitlines()[: len(before)] == before
    assert [(x["policy"], x["first"]) for x in lines] == [(name, first) for first in (0, 2) for name in found]
    full, snap = lines[:2]
    assert (full["bytes"], full["buffers"], full["agrees"], full["kl"]) == (1.0, 1.0, "11", [0, 0])
    assert all(x >= 0 for line in lines for x in line["kl"])
    assert snap["bytes"] == pytest.approx(0.1, abs=0.01)
    assert [len(x["answers"]) for x in lines] == [2, 2, 1, 1]
    assert [row.split(" | ")[0] for row in table] == ["| policy", "| ---", *(f"| {name}" for name in found)]
    assert "of 3 (+0 to +0)" in table[2]


def test_attention_of_both_models(tmp_path):
    found = attention.pictures(FOLDER, 2)
    for values in found.values():
        for name, value in values.items():
            assert value.shape == (6,), name
            assert np.all((value >= 0) & (value <= 1 + 1e-5)), name
        assert np.all(values["least"] <= values["heads"])
        assert np.all(values["heads"] <= values["most"])
        assert np.all(values["held 0.1"] <= values["best 0.1"] + 1e-6)
    pytest.importorskip("matplotlib")
    attention.plot(found, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
