"""Folders that hold something else than a whole model: the true cause and the remedy; and folders of links."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.safetensors import read_header
from vlcache_jax.models.families.registry import read_config
from vlcache_jax.models.io.weights_folder import SafetensorsFolder
from vlcache_jax.models.processor import Processor

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    make_tiny_llava(folder, text={"num_hidden_layers": 1})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
    ],
)
def test_git_lfs_pointers(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a git-LFS pointer.*git lfs pull"):
        vlc.load(folder)


@pytest.mark.parametrize("weights", [{}, {"model.safetensors.index.json": '{"weight_map": {"a": "x.safetensors"}}'}])
def test_pointers_of_an_index_and_its_shards(weights: dict[str, str], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    name = "x.safetensors" if weights else "model.safetensors.index.json"
    for file, text in (weights | {name: POINTER}).items():
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name} is a git-LFS pointer"):
        vlc.load(folder)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_without_its_model(config: bool, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}))
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r'an adapter .*of "llava-hf/llava-1\.5-7b-hf", not a whole.*merge_and_unload'
    ):
        vlc.load(folder)


def test_an_adapter_beside_a_whole_model_is_told_of(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"adapter_config\.json.*adapter is not applied"):
        vlc.load(folder, dtype="float32")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.fp16.safetensors"], r"weights only as the variant fp16 .*model\.fp16\.safetensors.*Rename"),
        (
            ["model.safetensors.index.bf16.json", "model.bf16-00001-of-00002.safetensors"],
            r"weights only as the variant bf16",
        ),
        (["model-00001-of-00002.safetensors"], r"the shard model-00001-of-00002\.safetensors, but no .*index\.json"),
        (["pytorch_model.bin"], r"weights only as pytorch_model\.bin; such files are pickled.*save_pretrained"),
        (["pytorch_model.bin", "model.fp16.safetensors"], r"the variant fp16"),
        (["consolidated.safetensors"], r"neither model\.safetensors nor .* \(it has consolidated\.safetensors\)"),
        (["llava.gguf"], r"\(it has llava\.gguf\)"),
        ([], r"has neither model\.safetensors nor model\.safetensors\.index\.json; download the weights"),
    ],
)
def test_folders_without_readable_weights(names: list[str], message: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        vlc.load(folder)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {}}, "{}"),
        ({"quantization_config": "int4"}, "int4"),
    ],
)
def test_quantised_weights_are_refused_by_method(config: dict[str, Any], method: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"never read")
    edit(folder, **config)
    with pytest.raises(CheckpointError, match=rf"weights are quantised .*{method}.* are read.*dequantize\(\)"):
        vlc.load(folder)


def test_a_quantised_text_model_is_refused(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(CheckpointError, match='quant_method is "hqq"'):
        vlc.load(folder)
    edit(folder, text_config=text, quantization_config=None)
    assert read_config(folder).decoder.num_layers == 1


def test_quantised_tensors_are_known_without_the_config(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "language" in name)
    del tensors[name]
    for part in ("qweight", "qzeros", "scales"):
        tensors[name.replace("weight", part)] = torch.zeros(2, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"weights .* are quantised \(it has the tensor '.*q_proj\.q(weight|zeros)'"
    ):
        vlc.load(folder)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int8", "bool"]
)
def test_element_types_that_are_known_but_not_read(dtype: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "language" in name)
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors")
    kind = next(info.dtype for info in read_header(folder / "model.safetensors")[0] if info.name == name)
    with pytest.raises(CheckpointError, match=rf"unsupported dtype .*bfloat16|{name}: {kind}") as caught:
        vlc.load(folder)
    assert f"{name}: {kind}" in str(caught.value)
    assert "download it again" not in str(caught.value)


def test_checkpoints_of_llavas_own_code(folder: Path) -> None:
    edit(folder, model_type="llava_llama")
    with pytest.raises(CheckpointError, match=r'model_type is "llava_llama".*llava-hf'):
        vlc.load(folder)


def linked(whole: Path, folder: Path) -> Path:
    """A folder of links to files elsewhere under other names, as a store of models has them."""
    store = folder / "store"
    store.mkdir(parents=True)
    links = folder / "links"
    links.mkdir()
    for number, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, store / f"sha256-{number}")
        (links / path.name).symlink_to(f"../store/sha256-{number}")
    return links


def test_links_are_followed_on_request(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = linked(whole, tmp_path)
    for read in (vlc.load, read_config, SafetensorsFolder, Processor.from_folder):
        with pytest.raises(CheckpointError, match=r"links to .*sha256-\d+, outside .*allow_links=True.*--allow-links"):
            read(folder)
    vlm = vlc.load(folder, dtype="float32", allow_links=True)
    jax.tree.map(np.testing.assert_array_equal, vlm.params, vlc.load(whole, dtype="float32").params)
    assert vlm.processor.has_chat_template
    arguments = [
        "generate",
        "--prompt",
        "w1",
        "--max-new-tokens",
        "1",
        "--no-compilation-cache",
        "--policy",
        "full_cache",
    ]
    assert main([*arguments, "--model", str(folder)]) == 2
    assert "--allow-links" in capsys.readouterr().err
    assert main([*arguments, "--model", str(folder), "--allow-links"]) == 0


def test_links_to_what_is_no_file(whole: Path, tmp_path: Path) -> None:
    folder = linked(whole, tmp_path)
    config = folder / "config.json"
    for target, message in (
        ("../store", r"config\.json is a folder, not a plain file"),
        ("../gone", r"config\.json is missing \(it links to \.\./gone, which does not exist\)"),
        ("config.json", r"config\.json cannot be read"),
        ("/dev/zero", r"config\.json is a device, not a plain file"),
    ):
        config.unlink()
        config.symlink_to(target)
        with pytest.raises(CheckpointError, match=message):
            vlc.load(folder, allow_links=True)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match=r"config\.json is a FIFO, not a plain file"):
        vlc.load(folder)
