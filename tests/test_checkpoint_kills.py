"""Whenever a writer of weights is killed, the folder holds the whole old weights or the whole new ones."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vlcache_jax.errors import InputError
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.io.params_writer import save_params
from vlcache_jax.models.io.weights_folder import SafetensorsFolder
from vlcache_jax.models.vision.config import VisionConfig

CONFIG = LlavaConfig(
    model_type="llava",
    vision=VisionConfig(hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, image_size=4, patch_size=2),
    decoder=DecoderConfig(
        family="llama",
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        max_positions=16,
    ),
    image_token_id=1,
    feature_layers=(1,),
)
WHOLE = 10**9
CALLS = ("open", "replace", "rename", "unlink", "remove", "fsync", "ftruncate", "fchmod", "link", "mkdir")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nothing here needs a disk that keeps its data."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    """Nothing catches it but what cleans up, which then comes to nothing: every call fails from then on."""


LEAVES = Llava(CONFIG).abstract_params()


def weights(value: float) -> Any:
    return jax.tree.map(lambda x: np.full(x.shape, value, np.float32), LEAVES)


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Dies in place of the `step`-th call that could change the folder."""
    done = iter(range(10**6))

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(done) >= step:
                raise Killed
            return call(*args, **options)

        return wrapped

    for name in CALLS:
        patch.setattr(os, name, dying(getattr(os, name)))


def held(folder: Path) -> float | None:
    """The value of all the weights; None if there are none."""
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    found = SafetensorsFolder(folder)
    values = {float(x) for name in found.tensors if "post_layernorm" not in name for x in np.unique(found.view(name))}
    assert len(values) == 1, f"a mixture of {values}"
    return values.pop()


@pytest.mark.parametrize("new", [WHOLE, 250, 300], ids=["to one file", "to shards", "to fewer shards"])
@pytest.mark.parametrize("old", [None, WHOLE, 250], ids=["new folder", "one file", "shards"])
def test_a_killed_writer_leaves_the_old_weights_or_the_new_ones(old, new, tmp_path):
    seen, step = [], 0
    while not seen or seen[-1] is not True:
        folder = tmp_path / str(step)
        if old is not None:
            save_params(weights(1.0), folder, CONFIG, old)
        folder.mkdir(exist_ok=True)
        (folder / "model-notes-of-mine.safetensors").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            try:
                save_params(weights(2.0), folder, CONFIG, new)
            except Killed:
                finished = False
            else:
                finished = True
        seen.append(held(folder))
        if step % 3 == 0 or finished:
            save_params(weights(3.0), folder, CONFIG, 300)  # it goes on as if nothing had been
            assert held(folder) == 3.0
            left = {path.name for path in folder.iterdir()}
            shards = {info.file for info in SafetensorsFolder(folder).tensors.values()}
            assert left == shards | {"model.safetensors.index.json", "model-notes-of-mine.safetensors"}
        if finished:
            assert seen[-1] == 2.0
            seen.append(True)
        step += 1
    before = None if old is None else 1.0
    assert seen[0] == before
    switched = seen.index(2.0)
    assert set(seen[:switched]) == {before}
    assert set(seen[switched:-1]) == {2.0}
    assert step > 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_weights_and_nothing_else(call, tmp_path):
    save_params(weights(1.0), tmp_path, CONFIG, 250)
    before = sorted(path.name for path in tmp_path.iterdir())
    for allowed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            done, real = iter(range(100)), getattr(os, call)

            def full(*args: Any, done: Any = done, real: Any = real, allowed: int = allowed) -> Any:
                if next(done) >= allowed:
                    raise OSError(28, "No space left on device")
                return real(*args)

            patch.setattr(os, call, full)
            with pytest.raises(InputError, match="No space left"):
                save_params(weights(2.0), tmp_path, CONFIG, 250)
        assert held(tmp_path) == 1.0
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_of_others_stay(tmp_path):
    save_params(weights(1.0), tmp_path, CONFIG, 250)
    index = tmp_path / "model.safetensors.index.json"
    first = sorted(tmp_path.glob("model-*"))[0]
    (tmp_path / "model-00077-of-00099.safetensors").write_bytes(b"not ours, and in no index")
    (tmp_path / "model-00078-of-00099.safetensors").symlink_to(first)
    index.write_text(index.read_text().replace(first.name, f"../{tmp_path.name}/../precious.safetensors"))
    (tmp_path.parent / "precious.safetensors").write_text("precious")
    save_params(weights(2.0), tmp_path, CONFIG)
    assert held(tmp_path) == 2.0
    assert (tmp_path.parent / "precious.safetensors").read_text() == "precious"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "model-00077-of-00099.safetensors",
        "model-00078-of-00099.safetensors",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
@pytest.mark.parametrize("size", [WHOLE, 250])
def test_what_is_no_plain_file_is_not_replaced(name, kind, size, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "blob").write_text("of a cache")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "blob")
    else:
        os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} cannot be written: it is a {kind}"):
        save_params(weights(1.0), folder, CONFIG, size)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (tmp_path / "blob").read_text() == "of a cache"
