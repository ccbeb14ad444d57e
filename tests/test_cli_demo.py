"""`vlcache-jax demo`, on assets made here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.demo import MAX_NEW_TOKENS
from vlcache_jax.cli.main import main
from vlcache_jax.terminal.table import megabytes, percent, table


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_tiny_llava(folder / "demo_model")
    images = folder / "demo_images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(images / f"{name}.png")
    questions = [
        {"images": ["a.png"], "question": "w1 w2 w3", "answer": "w4", "task": "one"},
        {"images": ["a.png", "b.png"], "question": "w5", "answer": "w6 w7", "task": "two"},
    ]
    (images / "questions.json").write_text(json.dumps(questions))
    return folder


def demo(assets: Path, *arguments: str) -> int:
    return main(["demo", "--assets", str(assets), "--no-compilation-cache", *arguments])


def test_page_and_json(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo(assets, "--policy", "vl_cache:0.2", "--explain", str(tmp_path / "kept.png")) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 100
    assert demo(assets, "--policy", "vl_cache:0.2", "--json") == 0
    result = json.loads(capsys.readouterr().out)

    vlm = vlc.load(assets / "demo_model", dtype="float32")
    conversations = []
    for entry, names in zip(result["questions"], (["a"], ["a", "b"]), strict=True):
        content = [{"type": "image", "image": assets / "demo_images" / f"{name}.png"} for name in names]
        content.append({"type": "text", "text": entry["question"]})
        conversations.append([{"role": "user", "content": content}])
    batch = vlm.processor.chat(conversations)
    for name, policy in (("full", vlc.FullCache()), ("compressed", vlc.VLCache(0.2))):
        out = vlc.generate(vlm.model, vlm.params, batch, policy, MAX_NEW_TOKENS)
        assert [entry["answers"][name] for entry in result["questions"]] == vlm.processor.decode(out)
    assert [entry["kept"] for entry in result["questions"]] == out.report.kept.tolist()
    assert [entry["visual_tokens"] for entry in result["questions"]] == [16, 32]
    for entry in result["questions"]:
        assert all(str(count) in page for count in entry["kept"])
        assert f"question         {entry['question']}" in page
    assert result["runs"]["full"]["state_bytes"] == result["full_bytes"]
    assert result["runs"]["compressed"]["state_bytes"] < result["full_bytes"]
    assert megabytes(result["full_bytes"]) in page
    full, ours = (result["runs"][name] for name in ("full", "compressed"))
    for label, field in (("KV cache of the prompts", "state_bytes"), ("room for the answers", "tail_bytes")):
        (line,) = (line for line in page.splitlines() if line.strip().startswith(label))
        assert megabytes(full[field]) in line
        assert megabytes(ours[field]) in line
    (line,) = (line for line in page.splitlines() if line.strip().startswith("held together"))
    held = [run["state_bytes"] + run["tail_bytes"] for run in (full, ours)]
    assert (
        line.split("together")[1].split()
        == f"{megabytes(held[0])} {megabytes(held[1])} {percent(held[1] / held[0])}".split()
    )
    assert page.count("[right]") + page.count("[wrong]") == 4
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_own_question(assets: Path, capsys: pytest.CaptureFixture) -> None:
    image = str(assets / "demo_images" / "b.png")
    assert demo(assets, "--image", image, "--question", "w1") == 0
    page = capsys.readouterr().out
    assert "expected" not in page
    assert "[wrong]" not in page
    assert "1 question" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "w1"], "belong together"),
        (["--image", "x.png"], "belong together"),
        (["--policy", "vl_cache:1.5"], "budget=1.5 is out of range"),
        (["--image", "absent.png", "--question", "w1"], "is missing"),
    ],
)
def test_refuses(assets: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert demo(assets, *arguments) == 2
    assert message in capsys.readouterr().err


def test_incomplete_assets(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo(tmp_path) == 2
    assert "train-demo" in capsys.readouterr().err
    (tmp_path / "demo_model").mkdir()
    assert demo(tmp_path) == 2
    assert "questions.json is no list of questions" in capsys.readouterr().err


def test_table() -> None:
    assert table([["a", "bb", "1"], ["ccc", "d", "22"]]) == "  a    bb   1\n  ccc   d  22"
    assert [megabytes(n) for n in (1_234_567, 12_345_678, 1_234_567_890)] == ["1.23 MB", "12.3 MB", "1,235 MB"]
    assert [percent(x) for x in (0.1, 0.1276, 0.0996, 1.0, 0.005)] == ["10 %", "12.8 %", "9.96 %", "100 %", "0.5 %"]
