"""What SparseMM takes for scores of heads, and the script that measures them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stub_model import StubModel, stub_batch, stub_params

import vlcache_jax as vlc
from vlcache_jax.policies.methods.sparse_mm import head_scores

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "head_scores.py"


def test_a_file_the_numbers_and_the_authors_form(tmp_path):
    numbers = [[0, 2, 1, 1], [3, 0, 0, 0.5], [1, 1, 1, 1]]
    plain, authors = tmp_path / "heads.json", tmp_path / "authors.json"
    plain.write_text(json.dumps(numbers))
    named = {f"{i}-{j}": [x / 2, 1.5 * x] for i, row in enumerate(numbers) for j, x in enumerate(row)}
    authors.write_text(json.dumps(named))
    wanted = vlc.SparseMM(scores=numbers)
    assert vlc.SparseMM(scores=plain) == vlc.policy_by_name(f"sparse_mm,scores={plain}") == wanted
    assert vlc.SparseMM(scores=str(authors)) == wanted
    assert hash(wanted) == hash(vlc.SparseMM(scores=plain))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("no/such.json", r"scores of 'no/such.json': .*No such file"),
        ([[1, 2], [1]], "equally many numbers of 0 or more for each layer, not all of them 0"),
        ([[0, 0], [0, 0]], "not all of them 0"),
        ([[1, -1]], "equally many numbers of 0 or more"),
        ([[1, True]], "equally many numbers of 0 or more"),
        ([[1, float("nan")]], "equally many numbers of 0 or more"),
        ([], r"\[\] is no list of layers with a list of heads in each"),
        (7, "7 is no list of layers"),
        ({"0-0": 1, "0-1": 1, "1-0": 1}, "keys must be layer-head, from 0-0 on"),
        ({"a": 1}, "keys must be layer-head"),
        ({"0-0": []}, "equally many numbers"),
    ],
)  # fmt: skip
def test_refused(scores, message):
    with pytest.raises(vlc.PolicyError, match=message):
        head_scores(scores)


def test_scores_of_another_model():
    batch = stub_batch()
    for scores in ([[1, 1, 1, 1]] * 2, [[1, 1, 1]] * 3):
        with pytest.raises(vlc.PolicyError, match=r"policy 'sparse_mm': scores are of .* measure them on this model"):
            vlc.prefill(StubModel(), stub_params(batch), batch, vlc.SparseMM(0.4, scores=scores))


@pytest.mark.thorough
def test_the_script_finds_the_heads_that_read(tmp_path):
    path = tmp_path / "heads.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--samples", "6", "--batch", "4", "--output", str(path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(path.read_text())
    assert len(scores) == 6
    best = max(range(6), key=lambda layer: max(scores[layer]))
    assert max(scores[best]) > 1 > 10 * max(scores[5])  # some read nearly every token, others none
