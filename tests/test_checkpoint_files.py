"""Damaged, hostile and incomplete checkpoint folders are refused with a message that names the culprit."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.io.files import file_inside
from vlcache_jax.models.io.weights_folder import SafetensorsFolder

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.full((4,), 1.5, dtype=torch.bfloat16)}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_views_are_lazy_exact_and_read_only(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert {n: (i.dtype, i.shape) for n, i in folder.tensors.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    np.testing.assert_array_equal(folder.view("a"), TENSORS["a"].numpy())
    assert folder.view("b").dtype == jnp.bfloat16
    assert (folder.view("b") == 1.5).all()
    with pytest.raises(ValueError, match="read-only"):
        folder.view("a")[0, 0] = 1
    base = folder.view("a")
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert not base.flags.owndata


def test_integers_are_listed_but_not_read(tmp_path: Path) -> None:
    save_file({"q": torch.ones(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"'q'.*I8; supported: F64, F32, F16, BF16"):
        folder.view("q")


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"w": entry()}, b"\0" * 7, None, "truncated"),
        ({"w": entry()}, b"\0" * 9, None, "tensors end at byte"),
        ({"w": entry()}, b"", 1 << 60, "claims 1152921504606846976 bytes"),
        ({"w": entry()}, b"", 5000, "claims 5000 bytes"),
        ({"w": entry()}, b"\0" * 8, 3, "not JSON"),
        (b"[1]", b"", None, "not a JSON object"),
        (b"\xff\xfe{", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        (b'{"w": 1, "w": 2}', b"", None, "twice"),
        ({"w": 5}, b"", None, "'w' is described as 5"),
        ({"w": entry(dtype="F33")}, b"\0" * 8, None, "'w' has the element type \"F33\", which is not known"),
        ({"w": entry(dtype=["F32"])}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(shape=[-2])}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(shape=[2.0])}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(shape=[True, 2])}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(shape="22")}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(offsets=[0])}, b"\0" * 8, None, "'w' is described as"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, None, "'w' is described as"),
        ({"w": entry(shape=[3])}, b"\0" * 8, None, r"'w' of F32 \[3\] cannot fill bytes 0 to 8"),
        ({"w": entry(offsets=[8, 0])}, b"\0" * 8, None, "cannot fill"),
        ({"w": entry(offsets=[4, 12])}, b"\0" * 12, None, "'w' starts at byte"),
        ({"w": entry(), "v": entry()}, b"\0" * 8, None, "starts at byte"),
    ],
)
def test_corrupt_files(header: Any, data: bytes, length: int | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            SafetensorsFolder(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 255))
def test_no_bytes_escape_as_another_error(tmp_path_factory: Any, junk: bytes, position: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    whole = bytearray(path.read_bytes())
    whole[position] = value
    for content in (junk, bytes(whole)):
        path.write_bytes(content)
        try:
            reader = SafetensorsFolder(folder)
            for name in reader.tensors:
                reader.view(name).tobytes()
        except CheckpointError:
            pass


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        SafetensorsFolder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        SafetensorsFolder(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a folder, not a plain file"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.ckpt"])
def test_pickle_is_refused_and_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(CheckpointError, match=rf"{name}.*pickled.*refused.*save_pretrained"):
            SafetensorsFolder(tmp_path)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("bad", [None, {}, [], {"a": 1}, "x"])
def test_index_without_a_map(bad: Any, tmp_path: Path) -> None:
    index(tmp_path, bad)
    with pytest.raises(CheckpointError, match="'weight_map'"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_index_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "C:x", "x\0"]
)
def test_index_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "secret.safetensors")
    save_file(TENSORS, inner / "sub" / "x.safetensors")
    index(inner, {"a": name})
    with pytest.raises(CheckpointError, match="not a plain name"):
        SafetensorsFolder(inner)


def test_links_cannot_leave_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (inner / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match=r"links to .*secret\.safetensors, outside"):
        SafetensorsFolder(inner)
    (inner / "model.safetensors").unlink()
    (inner / "shard.safetensors").symlink_to("../secret.safetensors")
    index(inner, {"a": "shard.safetensors"})
    with pytest.raises(CheckpointError, match="outside"):
        SafetensorsFolder(inner)
    (inner / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop"):
        file_inside(inner, "loop")


def test_links_within_the_folder_and_the_hubs_cache_are_fine(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors").symlink_to("other.safetensors")
    assert set(SafetensorsFolder(tmp_path).tensors) == {"a", "b"}

    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "ab12")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    assert set(SafetensorsFolder(snapshot).tensors) == {"a", "b"}
    (tmp_path / "link").symlink_to(snapshot)
    assert set(SafetensorsFolder(tmp_path / "link").tensors) == {"a", "b"}

    # Models of one cache may share blobs, by a second link.
    shared = tmp_path / "blobs" / "ab"
    shared.mkdir(parents=True)
    (blobs / "ab12").rename(shared / "ab12")
    (blobs / "ab12").symlink_to("../../blobs/ab/ab12")
    assert set(SafetensorsFolder(snapshot).tensors) == {"a", "b"}
    for elsewhere in (tmp_path / "other.safetensors", blobs / "in" / "x", tmp_path / "models--x--z" / "blobs" / "x"):
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "other.safetensors", elsewhere) if not elsewhere.exists() else None
        (blobs / "ab12").unlink()
        (blobs / "ab12").symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
            SafetensorsFolder(snapshot)


def test_shards_that_disagree_with_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"'b' in one\.safetensors, which does not hold it"):
        SafetensorsFolder(tmp_path)
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        SafetensorsFolder(tmp_path)
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is both in one\.safetensors and in two\.safetensors .* differ"):
        SafetensorsFolder(tmp_path)


def test_the_same_tensor_twice_is_read_once(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(3), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.warns(UserWarning, match=r"'a' is both in one\.safetensors and in two\.safetensors .* same bytes"):
        folder = SafetensorsFolder(tmp_path)
    assert folder.tensors["a"].file == "one.safetensors"
    assert folder.view("a").tolist() == [1, 1, 1]
    for different in (torch.ones(3, dtype=torch.float64), torch.ones(3, 1), torch.tensor([1.0, 1.0, float("nan")])):
        save_file({"a": different, "b": torch.zeros(1)}, tmp_path / "two.safetensors")
        with pytest.raises(CheckpointError, match=r"'a' is both in .* differ"):
            SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("other", ["two", "model-00002-of-00002"])  # the latter is found though the index forgot it
def test_an_index_that_names_the_wrong_shard(other: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / f"{other}.safetensors")
    listed = {"a": "one.safetensors", "b": "one.safetensors"}
    index(tmp_path, listed | ({"c": "two.safetensors"} if other == "two" else {}))
    with pytest.warns(UserWarning, match=rf"wrong file for 1 tensors, such as 'b': it says one.*{other}.*holds it"):
        folder = SafetensorsFolder(tmp_path)
    assert folder.tensors["b"].file == f"{other}.safetensors"
    assert folder.view("b").tolist() == [0]
    save_file({"b": torch.zeros(1)}, tmp_path / f"{other}.safetensors")
    index(tmp_path, listed | {"d": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"'.' in one\.safetensors, which does not hold it, nor does another"):
        SafetensorsFolder(tmp_path)
