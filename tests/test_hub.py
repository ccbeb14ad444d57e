"""Models by their id on the Hugging Face Hub, from a server on this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hub_server import COMMIT, TOKEN, Hub, serving
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.io.hub import find_checkpoint

MODEL = "llava-hf/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with files beside it that nobody should download."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    make_tiny_llava(folder, text={"num_hidden_layers": 1}, max_shard_size="20KB")
    for name in ("pytorch_model.bin", "modeling_tiny.py", "README.md", "model.fp16.safetensors", "weights.gguf"):
        (folder / name).write_bytes(b"never")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "onnx" / "model.safetensors").write_bytes(b"never")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that has the model, an empty cache, and a working directory without it."""
    with serving() as hub:
        hub.models[MODEL] = folder
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def test_an_id_is_downloaded_and_loaded(hub: Hub, folder: Path) -> None:
    vlm = vlc.load(MODEL, dtype="float32")
    local = vlc.load(folder, dtype="float32")
    assert vlm.config == local.config
    jax.tree.map(np.testing.assert_array_equal, vlm.params, local.params)
    assert vlm.processor(text=["user: w1"]).lengths.tolist() == [3]
    names = hub.downloaded()
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"} <= names
    assert not [name for name in names if "/" in name or not name.endswith((".json", ".jinja", ".safetensors"))]
    assert "model.fp16.safetensors" not in names
    sent = len(hub.requests)
    assert vlc.load(MODEL, dtype="float32").config == vlm.config
    assert not [path for _, path, _ in hub.requests[sent:] if "/resolve/" in path]  # all of it is in the cache


def test_revisions(hub: Hub) -> None:
    assert find_checkpoint(MODEL, revision="v1").path.name == COMMIT
    assert any(path.endswith("/revision/v1") for _, path, _ in hub.requests)
    assert find_checkpoint(MODEL, revision=COMMIT).has("config.json")
    with pytest.raises(CheckpointError, match=r"'llava-hf/tiny' has no revision 'v2'.*branches, tags or commits"):
        vlc.load(MODEL, revision="v2")


def test_offline_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CheckpointError, match=r"'llava-hf/tiny' is not.* in the cache, and HF_HUB_OFFLINE is set: unset"
    ):
        vlc.load(MODEL)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    online = find_checkpoint(MODEL)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint(MODEL) == online
    assert vlc.load(MODEL, dtype="float32").config.model_type == "llava"
    assert hub.requests == []


def test_without_a_network_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(CheckpointError, match=r"not.* in the cache, and the Hugging Face Hub cannot be reached: check"):
        vlc.load(MODEL)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    online = find_checkpoint(MODEL)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_checkpoint(MODEL) == online


def test_a_download_cut_off_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    find_checkpoint(MODEL, weights=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="in the cache, and HF_HUB_OFFLINE is set"):
        vlc.load(MODEL)


def test_models_that_are_not_there_private_or_gated(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no model 'llava-hf/none', or it is private.*HF_TOKEN.*local folder"
    ):
        vlc.load("llava-hf/none")
    for kind, message in ((hub.private, "it is private.*HF_TOKEN"), (hub.gated, "terms to be accepted.*HF_TOKEN")):
        kind.add(MODEL)
        with pytest.raises(CheckpointError, match=message):
            vlc.load(MODEL)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert find_checkpoint(MODEL, weights=False).has("config.json")
        assert hub.requests[-1][2] == TOKEN
        kind.clear()
        monkeypatch.delenv("HF_TOKEN")
        shutil.rmtree(find_checkpoint(MODEL, weights=False).path.parent.parent)


def test_a_model_that_is_not_supported_costs_no_weights(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mllama"}))
    hub.models["someone/other"] = other
    with pytest.raises(CheckpointError, match='model_type is "mllama"'):
        vlc.load("someone/other")
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]


def test_a_model_with_pickled_weights_alone(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    hub.models["someone/other"] = other
    with pytest.raises(CheckpointError, match=r"weights only as pytorch_model\.bin.*pickled"):
        vlc.load("someone/other")
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_server_that_fails(hub: Hub) -> None:
    hub.broken = True
    with pytest.raises(CheckpointError, match="llava-hf/tiny"):
        vlc.load(MODEL)


def test_a_folder_wins_and_paths_are_paths(hub: Hub, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / MODEL)
    assert vlc.load(MODEL, dtype="float32").config.model_type == "llava"
    assert find_checkpoint(f"./{MODEL}").path == Path(MODEL)
    with pytest.raises(
        CheckpointError, match=r"revision='main' is one of the Hugging Face Hub, but .* is a local path"
    ):
        vlc.load(MODEL, revision="main")
    for path in (
        "./llava-hf/gone",
        "/llava-hf/gone",
        "gone",
        "a/b/c",
        Path("llava-hf/gone"),
        "../gone",
        "",
        "a/",
        "a b/c",
    ):
        with pytest.raises(CheckpointError, match=r"llava-hf/llava-1\.5-7b-hf|config\.json is missing"):
            vlc.load(path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "file").write_text("")
    with pytest.raises(CheckpointError, match="owner/file is a file, not a folder"):
        vlc.load("owner/file")
    assert hub.requests == []
    for odd in ("a--b/c", "a/b.git"):
        with pytest.raises(CheckpointError, match="is no local folder and no id"):
            vlc.load(odd)
    for value in (3, None, b"a"):
        with pytest.raises(CheckpointError, match="is no path and no id"):
            vlc.load(value)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="revision=3 is no text"):
        vlc.load("a/b", revision=3)  # type: ignore[arg-type]


def test_the_command_line_takes_ids(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", MODEL, "--revision", "v1", "--prompt", "w1 w2", "--max-new-tokens", "2"]
    assert main([*arguments, "--policy", "full_cache", "--no-compilation-cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == MODEL
    assert main(["generate", "--model", "llava-hf/none", "--prompt", "w1"]) == 2
    assert "has no model 'llava-hf/none'" in capsys.readouterr().err


def test_planning_downloads_the_small_files_alone(hub: Hub) -> None:
    with pytest.raises(vlc.InputError, match="positions"):
        vlc.plan(MODEL, "v5e:1x1", prompt=10**6, new_tokens=1)
    assert "config.json" in hub.downloaded()
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]
