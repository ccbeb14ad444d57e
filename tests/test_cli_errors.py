"""Bad input to the command line: one line on standard error, exit status 2, before weights are read or compiled for."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import make_tiny_llava

from vlcache_jax.cli.main import main

Run = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_llava(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)).save(path)
    return path


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def refused(checkpoint: Path, image: Path, capsys: pytest.CaptureFixture) -> Iterator[Run]:
    """Runs `generate`, which must fail without compiling anything; returns the error message."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(*arguments: str, model: Path = checkpoint, images: tuple[Path, ...] = (image,), prompt: str = "w1") -> str:
        given = [part for path in images for part in ("--image", str(path))]
        status = main(["generate", "--model", str(model), *given, "--prompt", prompt, *arguments])
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert compiled == []
        (error,) = (line for line in err.splitlines() if not line.startswith("["))  # the others are progress
        assert error.startswith("vlcache-jax: error: ")
        return error

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield run
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were read before everything else was checked")

    monkeypatch.setattr("vlcache_jax.models.io.loading.load_params", fail)


@pytest.mark.usefixtures("no_weights")
class TestBeforeWeights:
    @pytest.mark.parametrize("budget", ["0", "1.5", "-0.1"])
    def test_budget(self, refused: Run, budget: str) -> None:
        assert f"budget={float(budget)} is out of range" in refused("--policy", f"vl_cache:{budget}")

    def test_budget_not_a_number(self, refused: Run) -> None:
        assert "'nan' is not a budget: give 0.1 or 10%" in refused("--policy", "vl_cache:nan")

    @pytest.mark.parametrize("count", ["0", "-3"])
    def test_new_tokens(self, refused: Run, count: str) -> None:
        assert f"--max-new-tokens: '{count}' is out of range" in refused("--max-new-tokens", count)

    def test_videos_of_a_model_that_takes_none(self, refused: Run, image: Path, tmp_path: Path) -> None:
        assert "a llava takes no videos: give some of its frames by --image" in refused("--video", str(image))
        assert "none.mp4' is not a file" in refused("--video", str(tmp_path / "none.mp4"))
        assert "--frames is of a video" in refused("--frames", "3")
        assert "resizes images to sizes of its own" in refused("--max-image-tokens", "64")

    def test_positions(self, refused: Run) -> None:
        assert "the model has 1024" in refused("--max-new-tokens", "1020")

    def test_policy_name(self, refused: Run) -> None:
        assert "did you mean 'vl_cache'?" in refused("--policy", "vl_cahce")

    def test_policy_option_name(self, refused: Run) -> None:
        assert "did you mean 'threshold'?" in refused("--policy", "vl_cache,treshold=0.1")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("threshold", "not of the form name=value"),
            ("threshold=high", "check the options' types"),
            ("threshold=2", "threshold=2 is out of range"),
            ("heads=some", "use 'each' or 'shared'"),
            ("rows=some", "use post_vision, last:COUNT"),
            ("rows=last:0", "'0' is out of range"),
            ("rows=last:" + "9" * 30, "is out of range"),
            ("window=" + "9" * 5000, "is out of range"),
            ("threshold=1e999", "check the options' types"),
        ],
    )
    def test_policy_option_value(self, refused: Run, option: str, message: str) -> None:
        assert message in refused("--policy", f"vl_cache,{option}")

    def test_option_twice(self, refused: Run) -> None:
        assert "'budget' is given twice" in refused("--policy", "vl_cache:0.2,budget=0.3")

    def test_budget_of_full_cache(self, refused: Run) -> None:
        assert "policy 'full_cache' has no option 'budget'" in refused("--policy", "full_cache:0.5")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--temperature", "-1"], "temperature=-1.0 must be above 0"),
            (["--top-k", "0"], "--top-k: '0' is out of range"),
            (["--top-p", "1.5"], "top_p=1.5 must lie in (0, 1]"),
            (["--seed", "-1"], "'-1' is out of range"),
        ],
    )
    def test_sampling(self, refused: Run, arguments: list[str], message: str) -> None:
        assert message in refused(*arguments)

    def test_empty_prompt(self, refused: Run) -> None:
        assert "the prompt is empty" in refused(prompt=" \n")

    def test_placeholders_without_images(self, refused: Run) -> None:
        assert "1 image tokens '<image>', but 0 images" in refused(images=(), prompt="<image> w1")

    def test_too_few_placeholders(self, refused: Run, image: Path) -> None:
        assert "1 image tokens '<image>', but 2 images" in refused(images=(image, image), prompt="w1 <image>")

    def test_raw_without_placeholder(self, refused: Run) -> None:
        assert "0 image tokens '<image>', but 1 images" in refused("--raw")

    def test_missing_image(self, refused: Run, tmp_path: Path) -> None:
        assert "absent.png') is missing" in refused(images=(tmp_path / "absent.png",))

    def test_unreadable_image(self, refused: Run, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no image")
        assert "cannot be read as an image" in refused(images=(tmp_path / "text.png",))

    @pytest.mark.parametrize("size", [(0, 5), (30_000, 30_000)])
    def test_size_of_image(self, refused: Run, tmp_path: Path, size: tuple[int, int]) -> None:
        path = tmp_path / "size.png"
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
        body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
        message = refused(images=(path,))
        assert "size.png" in message
        assert size[0] == 0 or "too many pixels" in message

    def test_missing_folder(self, refused: Run, tmp_path: Path) -> None:
        assert "does not exist" in refused(model=tmp_path / "absent")

    def test_missing_file(self, refused: Run, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        assert "has no tokenizer.json" in refused(model=copy)

    def test_model_type(self, refused: Run, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
        message = refused(model=copy)
        assert '"blip"' in message
        assert "llava_next" in message

    def test_pickle(self, refused: Run, copy: Path) -> None:
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        message = refused(model=copy)
        assert "pytorch_model.bin" in message
        assert "refused" in message

    def test_truncated_weights(self, refused: Run, copy: Path) -> None:
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "truncated" in refused(model=copy)

    def test_index_outside(self, refused: Run, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": "../image.png"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "'../image.png'" in refused(model=copy)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("picture.xyz", "no known image format"),
            ("picture", "no known image format"),
            ("no/p.png", "does not exist"),
        ],
    )
    def test_picture_path(self, refused: Run, tmp_path: Path, name: str, message: str) -> None:
        assert message in refused("--explain", str(tmp_path / name))

    def test_picture_is_a_folder(self, refused: Run, tmp_path: Path) -> None:
        (tmp_path / "folder.png").mkdir()
        assert "cannot be written" in refused("--explain", str(tmp_path / "folder.png"))


def test_tensors_that_do_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("vlcache_jax.evaluation.answering.prefill", None)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors["stray"] = tensors.pop(name)
    save_file(tensors, copy / "model.safetensors")
    assert main(["generate", "--model", str(copy), "--prompt", "w1", "--no-compilation-cache"]) == 2
    message = capsys.readouterr().err
    assert "layers.1.mlp.up_proj" in message
    assert "stray" in message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generat"],
        ["generate", "--model", "x"],
        ["generate", "--prompt", "x"],
        ["generate", "--model", "x", "--prompt", "x", "--json", "--stream"],
        ["generate", "--model", "x", "--prompt", "x", "--dtype", "int8"],
        ["generate", "--model", "x", "--prompt", "x", "--max-new-tokens", "many"],
        ["train-demo", "--minutes", "1", "--steps", "1"],
    ],
)
def test_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vlcache-jax: error: ")
    assert err.count("\n") == 1
