"""The small files of a checkpoint folder, each of which may be absent."""

from typing import Any

from vlcache_jax.files.limits import TEXT_BYTES
from vlcache_jax.models.checkpoint import files


def read_text(folder: files.Folder, name: str, most: int = TEXT_BYTES) -> str | None:
    """The text of `folder/name`, or None where there is no such file.

    Raises CheckpointError if it cannot be read, has more than `most` bytes, or is a link that leaves the folder.
    """
    checkpoint = files.checkpoint_folder(folder)
    return files.read_text(files.file_inside(checkpoint, name), most) if checkpoint.has(name) else None


def read_json(folder: files.Folder, name: str) -> dict[str, Any] | None:
    """The JSON object in `folder/name`, or None where there is no such file.

    Raises CheckpointError if it is malformed, or is a link that leaves the folder.
    """
    checkpoint = files.checkpoint_folder(folder)
    return files.read_json(files.file_inside(checkpoint, name)) if checkpoint.has(name) else None
