"""`vlcache-jax generate` on a tiny random checkpoint."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.evaluation import stopwatch
from vlcache_jax.policies.shares import total_slots
from vlcache_jax.terminal.table import megabytes

NEW_TOKENS = 8
OPTIONS = ["--policy", "vl_cache:0.3,heads=shared"]  # the same programs in several tests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_llava(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def generate(capsys: pytest.CaptureFixture, model: Path, images: list[Path], prompt: str, *arguments: str) -> Any:
    given = [part for path in images for part in ("--image", str(path))]
    start = ["generate", "--model", str(model), *given, "--prompt", prompt, "--no-compilation-cache"]
    assert main([*start, "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS), *arguments]) == 0
    out, err = capsys.readouterr()
    return (json.loads(out), err) if "--json" in arguments else (out, err)


def test_answers_as_the_library_does(
    checkpoint: Path, image: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    result, err = generate(capsys, checkpoint, [image], "w1 w2 w3", "--json", *OPTIONS)
    assert all(line.startswith("[") for line in err.splitlines())  # progress only
    vlm = vlc.load(checkpoint, dtype="float32")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2 w3"}]
    batch = vlm.processor.chat([[{"role": "user", "content": content}]])
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.3, heads="shared"), NEW_TOKENS)
    assert result["answer"] == vlm.processor.decode(out)[0]
    assert result["tokens"] == int(out.lengths[0])
    assert result["token_ids"] == out.tokens[0, : result["tokens"]].tolist()
    assert result["policy"] == "vl_cache"
    assert result["budget"] == 0.3
    assert result["prompt_tokens"] == int(batch.lengths[0])
    assert result["visual_tokens"] == 16
    assert result["kept"] == out.report.kept[0].tolist()
    assert sum(result["kept"]) == total_slots(3, result["prompt_tokens"], 0.3)
    assert result["kept_fraction"] == pytest.approx(sum(result["kept"]) / (3 * result["prompt_tokens"]))
    assert (result["state_bytes"], result["full_bytes"]) == (out.report.state_bytes, out.report.full_bytes)
    assert result["tail_bytes"] == out.report.tail_bytes
    assert result["held_bytes"] == result["state_bytes"] + result["tail_bytes"] == out.report.held_bytes
    assert set(result["seconds"]) == {"load", "compile", "prefill", "decode"}
    assert all(value > 0 for value in result["seconds"].values())
    assert result["versions"]["jax"] == jax.__version__
    assert result["device"]["platform"] == "cpu"

    streamed, err = generate(capsys, checkpoint, [image], "w1 w2 w3", "--stream", *OPTIONS)
    assert streamed == result["answer"] + "\n"
    parts = [megabytes(result[name]) for name in ("held_bytes", "state_bytes", "full_bytes", "tail_bytes")]
    assert "cache held {}: prompt {} instead of {}, room for the answer {};".format(*parts) in err
    picture = tmp_path / "kept.png"
    plain, _ = generate(capsys, checkpoint, [image], "w1 w2 w3", "--explain", str(picture), *OPTIONS)
    assert plain == streamed
    with Image.open(picture) as opened:
        assert opened.width == 1600


def test_prompts(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """By template, placed by the text, raw, and without a template: the same prompt gives the same answer."""
    full = ["--policy", "full_cache", "--json"]
    by_template, _ = generate(capsys, checkpoint, [image], "w1 w2", *full)
    placed, _ = generate(capsys, checkpoint, [image], "<image> w1 w2", *full)
    written = "user: <image> w1 w2 assistant: "
    raw, _ = generate(capsys, checkpoint, [image], written, "--raw", *full)
    plain = Path(shutil.copytree(checkpoint, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    without, _ = generate(capsys, plain, [image], written, *full)
    assert by_template["token_ids"] == placed["token_ids"] == raw["token_ids"] == without["token_ids"]
    assert by_template["prompt_tokens"] == placed["prompt_tokens"] == raw["prompt_tokens"] == 16 + 5
    assert by_template["kept_fraction"] == 1.0
    behind, _ = generate(capsys, checkpoint, [image], "w1 <image> w2", *full)
    assert behind["token_ids"] != by_template["token_ids"]


def test_pruning(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    """What the library drops; what cannot work is refused before the weights are read."""
    method = ["--policy", "vl_cache+pyramid_drop,layers=1,keep=0.25"]
    result, _ = generate(capsys, checkpoint, [image], "w1 w2 w3", "--json", *OPTIONS, *method)
    total, visual = result["prompt_tokens"], result["visual_tokens"]
    assert result["stage_tokens"] == [total, total - visual + visual // 4]
    _, remark = generate(capsys, checkpoint, [image], "w1 w2 w3", *OPTIONS, *method)
    assert f"({total} > {total - visual + visual // 4} from layer to layer)" in remark
    for text, message in (
        ("pyramid_dorp", "did you mean"),
        ("pyramid_drop,layers=1,keep=half", "give numbers"),
        ("pyramid_drop,layer=1", "does not exist"),
        ("pyramid_drop,layers=99,keep=0.5", "drops tokens behind layers"),
    ):
        start = ["generate", "--model", str(checkpoint), "--image", str(image), "--prompt", "w1", "--policy", text]
        assert main(start) != 0
        assert message in capsys.readouterr().err


def test_what_becomes_of_the_other_tokens_is_said(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    """At fewer bits; not of those that are merged into others, or dropped."""
    for policy, coded in (("ranked_bits:0.95", True), ("look_m:0.5", False), ("ranked_bits:0.2", False)):
        _, remark = generate(capsys, checkpoint, [image], "w1 w2 w3", *OPTIONS, "--policy", policy)
        assert (", the others at fewer bits" in remark) is coded, (policy, remark)


def test_sparse_prefill(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    """What was looked at is said; so is why nothing was left out."""
    pattern = ["--policy", "vl_cache + a_shape:1,window=1,block=4,min_tokens=0"]
    result, _ = generate(capsys, checkpoint, [image], "w1 w2 w3", "--json", *OPTIONS, *pattern)
    assert result["prefill"]["pattern"] == "AShape"
    assert all(0 < share < 1 for share in result["prefill"]["density"])
    _, remark = generate(capsys, checkpoint, [image], "w1 w2 w3", *OPTIONS, "--policy", "x_attention")
    assert "dense prefill: 64 tokens are fewer than XAttention(min_tokens=16384)" in remark
    start = ["generate", "--model", str(checkpoint), "--image", str(image), "--prompt", "w1", "--policy", "a_shap"]
    assert main(start) != 0
    assert "did you mean 'a_shape'" in capsys.readouterr().err


def test_sampling_and_seed(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    options = [*OPTIONS, "--temperature", "2.0", "--json", "--seed"]
    answers = [generate(capsys, checkpoint, [image], "w1 w2 w3", *options, seed)[0]["token_ids"] for seed in "112"]
    assert answers[0] == answers[1] != answers[2]


def test_stopwatch_tells_compiling_from_running() -> None:
    program = jax.jit(lambda x: jnp.sin(x) @ jax.jit(jnp.cos)(x))
    x = np.ones((4, 4), np.float32)
    with stopwatch.Stopwatch() as first:
        program(x).block_until_ready()
    with stopwatch.Stopwatch() as second:
        program(x).block_until_ready()
        time.sleep(0.05)
    assert first.compile > 0
    assert second.compile == 0
    assert second.run >= 0.05


def test_nested_compilations_count_once() -> None:
    assert stopwatch._covered([(1.0, 4.0), (2.0, 3.0), (3.5, 5.0), (7.0, 8.0)], 0.0) == 5.0
    assert stopwatch._covered([(1.0, 4.0)], 2.0) == 2.0
    assert stopwatch._covered([], 0.0) == 0.0
