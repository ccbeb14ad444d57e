"""The small files of a checkpoint folder, each of which may be absent."""

from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.checkpoint import files


def read_text(folder: Path, name: str) -> str | None:
    """The text of `folder/name`, or None where there is no such file.

    Raises CheckpointError if it cannot be read, or is a link that leaves the folder.
    """
    path = _path(folder, name)
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): download it again") from error


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in `folder/name`, or None where there is no such file.

    Raises CheckpointError if it is malformed, or is a link that leaves the folder.
    """
    path = _path(folder, name)
    return None if path is None else files.read_json(path)


def _path(folder: Path, name: str) -> Path | None:
    path = folder / name
    return files.file_inside(folder, name) if path.exists() or path.is_symlink() else None
