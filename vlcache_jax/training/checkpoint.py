"""Saving and resuming a whole train state, which may lie on the devices of several processes.

    run/state/state.safetensors     what the loop remembers, the arrays' types and shapes, a checksum of every file
    run/state/arrays-7/...          the arrays, as orbax writes them: each process what lies with it

The first is replaced when the new arrays are complete, and then the old ones are removed: a killed run leaves one state
or the other. Every bit is checked when a state is read, and nothing in it is ever run.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.reading import open_plain
from vlcache_jax.files.safetensors import NAMES, dtype_name
from vlcache_jax.files.tensor_files import Kind, TensorFile, write_tensor_file
from vlcache_jax.files.writing import check_target, make_folder, remove_folder

_KIND = Kind("vlcache_jax.train_state", "train state", 2, "delete it to start afresh")
_FILE, _ARRAYS = "state.safetensors", re.compile(r"arrays-[0-9]+")


class Saving:
    """A state that is being written on a thread, which the end of the program waits for."""

    def __init__(self, complete: Callable[[], None]) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                complete()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the state is complete. Raises, once, what `save_state` raises."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


_RUNNING: dict[Path, Saving] = {}


def save_state(
    path: str | os.PathLike[str],
    state: Any,
    progress: dict[str, Any] | None = None,
    *,
    background: bool = False,
) -> Saving | None:
    """Writes a pytree of arrays and a JSON-able dict of whatever the loop must remember.

    A killed run leaves the earlier state, or the new one. Where parts of the state lie with other processes, all must
    call it, with a folder that all of them see.

    Args:
      path: of the folder, which is made if need be.
      state: arrays and numbers.
      progress: numbers, texts, lists and dicts.
      background: return when the arrays have been copied to the host, so that the next step may have their memory;
        files are written meanwhile. The next state for the same folder, and `load_state`, wait for the one before.

    Returns:
      What to wait for, of a state in the background; else None, when all has been written.

    Raises:
      InputError: the folder cannot be written, progress is not JSON-able, or a leaf is of a type that is not saved.
        What goes wrong in the background is raised by `Saving.wait`, or by the next call that waits.

    Example:
      save_state("run/state", state, {"epoch": 1}, background=True)
    """
    arrays = {name: x if hasattr(x, "dtype") else np.asarray(x) for name, x in _named(state).items()}
    shapes = {name: [dtype_name(name, x), list(x.shape)] for name, x in arrays.items()}
    try:
        progress = json.loads(json.dumps(progress or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"progress cannot be written as JSON ({error}): give plain numbers, texts and lists"
        ) from error
    folder = make_folder(path).absolute()
    _finish(folder)
    check_target(folder / _FILE)
    numbers = (int(old.name.removeprefix("arrays-")) for old in folder.iterdir() if _ARRAYS.fullmatch(old.name))
    new = folder / f"arrays-{int(_of_first(np.int32(max(numbers, default=0)))) + 1}"

    def refused(error: Exception) -> InputError:
        remove_folder(new)
        return (
            error
            if isinstance(error, InputError)
            else InputError(f"{folder} cannot be written: {error}; choose another folder")
        )

    try:
        finish = _start_writing(new, {name: x for name, x in arrays.items() if x.size})
    except (OSError, ValueError) as error:
        raise refused(error) from error

    def complete() -> None:
        try:
            finish()
            if jax.process_index() == 0:
                description = {"progress": progress, "arrays": shapes, "folder": new.name, "files": _checksums(new)}
                write_tensor_file(folder / _FILE, _KIND, description, {})
        except (OSError, ValueError) as error:
            raise refused(error) from error
        if jax.process_index() == 0:
            for old in folder.iterdir():
                if old != new and _ARRAYS.fullmatch(old.name):
                    remove_folder(old)

    if background:
        _RUNNING[folder] = saving = Saving(complete)
        return saving
    complete()
    _of_first(np.int32(0))  # nobody goes on before the state is complete
    return None


def _finish(folder: Path) -> None:
    """Waits for a state that is being written there."""
    saving = _RUNNING.pop(folder, None)
    if saving is not None:
        saving.wait()


def load_state(path: str | os.PathLike[str], like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_state` wrote.

    Args:
      path: the folder.
      like: a pytree of arrays (or of `jax.ShapeDtypeStruct`) of the structure that was saved. An array's sharding
        is taken over, whatever it was when it was saved.

    Returns:
      (state, progress), bit for bit as saved.

    Raises:
      CheckpointError: there is no state, it is damaged, or it was saved from another structure.

    Example:
      state, progress = load_state("run/state", state)
    """
    folder = Path(path).absolute()
    _finish(folder)
    if not has_state(path):
        raise CheckpointError(f"there is no train state at {path}; start without resuming")
    file = TensorFile.open(folder / _FILE, _KIND)
    leaves = _named(like)
    described: list[Any] = [file.description.get(key) for key in ("arrays", "progress", "folder", "files")]
    shapes, progress, name, saved = described
    right = all(isinstance(x, dict) for x in (shapes, progress, saved)) and isinstance(name, str)
    if not right or not _ARRAYS.fullmatch(name):
        raise file.damaged("its description is of something else")
    if difference := sorted(leaves.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"{folder} was saved from another model or optimizer: {len(difference)} arrays differ, first "
            f"{difference[0]!r}; use the settings it was trained with"
        )
    for key, leaf in leaves.items():
        if shapes[key] != [NAMES.get(leaf.dtype), list(leaf.shape)]:
            raise CheckpointError(
                f"{folder}: {key} is {shorten(shapes[key])}, the model has {leaf.dtype} {list(leaf.shape)}; use the "
                "settings it was trained with"
            )
    found = _checksums(folder / name)
    for part in sorted(found.keys() | saved.keys()):
        if found.get(part) != saved.get(part):
            raise file.damaged(f"{name}/{part} has not the checksum it was saved with")
    arrays = _read_arrays(folder / name, {key: leaf for key, leaf in leaves.items() if leaf.size})
    loaded = [
        jax.device_put(arrays.get(key, np.zeros(leaf.shape, leaf.dtype)), _place(leaf)) for key, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), loaded), progress


def has_state(path: str | os.PathLike[str]) -> bool:
    """Whether a state was saved in a folder; waits for one that is being written."""
    _finish(Path(path).absolute())
    return os.path.lexists(Path(path) / _FILE)


def _named(state: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _place(leaf: Any) -> Any:
    """Where an array shall lie; None for one that JAX may move to where others are, as a count of steps."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)


def _of_first(x: Any) -> Any:
    """What the first process has, when all have come here."""
    return multihost_utils.broadcast_one_to_all(x) if jax.process_count() > 1 else x


def _local(x: Any) -> bool:
    """Of several processes orbax knows arrays that they share, and NumPy's, which are the same everywhere."""
    return jax.process_count() > 1 and getattr(x, "is_fully_addressable", True)


def _start_writing(folder: Path, arrays: dict[str, Any]) -> Callable[[], None]:
    """Copies arrays to the host and begins to write them; what is returned waits until all processes have."""
    from orbax.checkpoint import AsyncCheckpointer, PyTreeCheckpointHandler, args  # a second to import

    arrays = {name: np.asarray(x) if _local(x) else x for name, x in arrays.items()}
    checkpointer = AsyncCheckpointer(PyTreeCheckpointHandler())
    try:
        checkpointer.save(folder, args=args.PyTreeSave(arrays))
    except BaseException:
        checkpointer.close()
        raise

    def finish() -> None:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return finish


def _read_arrays(folder: Path, leaves: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import ArrayRestoreArgs, Checkpointer, PyTreeCheckpointHandler, RestoreArgs, args

    def how(leaf: Any) -> Any:
        sharding = _place(leaf)
        if sharding is None or _local(sharding):
            return RestoreArgs(restore_type=np.ndarray)
        return ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    restored = args.PyTreeRestore(like, restore_args={name: how(leaf) for name, leaf in leaves.items()})
    with Checkpointer(PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder, args=restored)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            try:
                with open_plain(path) as stream:
                    digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]
                found[path.relative_to(folder).as_posix()] = digest.hexdigest()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found
