"""Reading the small text files of a checkpoint folder, with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError


def open_folder(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder at `path`. Raises CheckpointError if it is not a folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise CheckpointError(
            f"checkpoint folder {str(path)!r} is {what}: give the path of a local folder that holds "
            "config.json "
            "(download a model first; nothing is fetched here)"
        )
    return folder.resolve()


def read_text(folder: Path, name: str) -> str | None:
    """The text of `folder/name`, or None where there is no such file.

    Links may point into the folder, or into the `blobs` folder of the hub cache that the folder is a snapshot
    of (`models--*/snapshots/<revision>`); a link to anywhere else is refused, since checkpoints are
    untrusted.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    target = path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{path} leads out of the checkpoint folder: replace the link by a copy of the file"
        )
    try:
        return target.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): download it again") from error


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in `folder/name`, or None where there is no such file."""
    text = read_text(folder, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{folder / name} holds a JSON {type(value).__name__}, not an object: download it again"
        )
    return value
