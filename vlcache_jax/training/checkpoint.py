"""Saving and resuming a whole train state in one safetensors file: no pickle, written atomically."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlcache_jax.errors import CheckpointError


def save_state(path: str | os.PathLike[str], state: Any, progress: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays and a JSON-able dict of whatever the loop must remember.

    The file appears under its name only when it is complete, so a killed run leaves the previous one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(key): np.asarray(jax.device_get(leaf), order="C") for key, leaf in leaves}
    partial = path.with_name(path.name + ".partial")
    save_file(arrays, partial, metadata={"progress": json.dumps(progress or {})})
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_state(path: str | os.PathLike[str], like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_state` wrote.

    Args:
      path: the file.
      like: a pytree of arrays (or of `jax.ShapeDtypeStruct`) of the structure that was saved. An array's sharding
        is taken over.

    Returns:
      (state, progress), bit for bit as saved.

    Raises:
      CheckpointError: the file is missing or corrupt, or was saved from another structure.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            progress = json.loads((file.metadata() or {}).get("progress", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no train state at {path}; start without resuming") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a readable train state ({error}); delete it to start afresh") from error
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
                f"{path}: {name} is {array.dtype}{list(array.shape)}, the model has {leaf.dtype}{list(leaf.shape)}"
            )
        loaded.append(jax.device_put(array, getattr(leaf, "sharding", None)))
    return jax.tree_util.tree_unflatten(structure, loaded), progress
