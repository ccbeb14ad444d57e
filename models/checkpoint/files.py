"""Finding a checkpoint's files without ever leaving its folder."""

import json
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError


def checkpoint_folder(folder: str | Path) -> Path:
    """`folder` as a Path.

    Raises:
      CheckpointError: if it is not an existing folder.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint folder {path} {what}; give a local folder with config.json and weights")
    return path


def file_inside(folder: Path, name: str) -> Path:
    """The file called `name` in a checkpoint folder.

    The name must be plain, and the file must really lie there: names come from files that others wrote. The
    one exception is the cache of the Hugging Face Hub, where `snapshots/<commit>/<name>` links into
    `blobs/`.

    Raises:
      CheckpointError: if the name or what it links to leaves the folder, or there is no such file.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or ":" in name:
        raise CheckpointError(f"file name {name!r} in {folder} is not a plain name inside the checkpoint folder")
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resolved: {error}") from error  # a loop of links
    hub_blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if target.parent != root and target.parent != hub_blobs:
        raise CheckpointError(f"{path} links to {target}, outside the checkpoint folder; copy the file there instead")
    if not target.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, download it again")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: if the file cannot be read or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
