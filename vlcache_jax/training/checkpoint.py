"""Saving and resuming a whole train state in one file: no pickle, written whole or not at all, with checksums."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.tensor_files import Kind, TensorFile, write_tensor_file
from vlcache_jax.files.writing import make_folder
from vlcache_jax.parallel.mesh import is_known, on_every_process

_KIND = Kind("vlcache_jax.train_state", "train state", 1, "delete it to start afresh")


def save_state(path: str | os.PathLike[str], state: Any, progress: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays and a JSON-able dict of whatever the loop must remember.

    The file appears under its name only when it is complete, so a killed run leaves the previous one. Where parts of
    the state lie with other processes, all must call it, and the first one writes.

    Raises:
      InputError: the file cannot be written, progress is not JSON-able, or a leaf is of a type that no file holds.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    try:
        description = {"progress": json.loads(json.dumps(progress or {}, allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"progress cannot be written as JSON ({error}): give plain numbers, texts and lists"
        ) from error
    arrays = {jax.tree_util.keystr(key): x if hasattr(x, "dtype") else np.asarray(x) for key, x in leaves}
    if not all(is_known(x) for x in arrays.values()):
        arrays = {name: np.asarray(on_every_process(x)) for name, x in arrays.items()}
        if jax.process_index():
            return
    make_folder(Path(path).parent)
    write_tensor_file(path, _KIND, description, arrays)


def load_state(path: str | os.PathLike[str], like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_state` wrote.

    Args:
      path: the file.
      like: a pytree of arrays (or of `jax.ShapeDtypeStruct`) of the structure that was saved. An array's sharding
        is taken over.

    Returns:
      (state, progress), bit for bit as saved.

    Raises:
      CheckpointError: the file is missing or damaged, or was saved from another structure.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no train state at {path}; start without resuming")
    file = TensorFile.open(path, _KIND)
    progress = file.description.get("progress")
    if not isinstance(progress, dict):
        raise file.damaged(f"its progress is {shorten(progress)}, not an object")
    arrays = file.arrays()
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(key) for key, _ in leaves]
    if difference := sorted(set(names) ^ set(arrays)):
        raise CheckpointError(
            f"{path} was saved from another model or optimizer: {len(difference)} arrays differ, first "
            f"{difference[0]!r}; use the settings it was trained with"
        )
    loaded = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        array = arrays[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise CheckpointError(
                f"{path}: {name} is {array.dtype}{list(array.shape)}, the model has {leaf.dtype}{list(leaf.shape)}; "
                "use the settings it was trained with"
            )
        loaded.append(jax.device_put(array, getattr(leaf, "sharding", None)))
    return jax.tree_util.tree_unflatten(structure, loaded), progress
