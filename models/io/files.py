"""Finding and reading the small files of a checkpoint folder, without ever leaving it."""

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import parse_json
from vlcache_jax.files.limits import JSON_BYTES, TEXT_BYTES
from vlcache_jax.files.reading import open_plain
from vlcache_jax.files.writing import kind_of

_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class CheckpointFolder(os.PathLike[str]):
    """A local folder, and how far its links may lead.

    Attributes:
      path: where it is.
      allow_links: follow links out of the folder, as in the stores of models that some programs keep.
    """

    path: Path
    allow_links: bool = False

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether something of that name is there, a broken link included."""
        return os.path.lexists(self.path / name)


Folder = str | os.PathLike[str] | CheckpointFolder


def checkpoint_folder(folder: Folder, allow_links: bool = False) -> CheckpointFolder:
    """`folder` as a CheckpointFolder; one that is such already stays as it is.

    Raises:
      CheckpointError: if it is not an existing folder.
    """
    if isinstance(folder, CheckpointFolder):
        return folder
    path = Path(folder)
    try:
        if path.is_dir():
            return CheckpointFolder(path, allow_links)
        what = "is a file, not a folder" if os.path.lexists(path) else "does not exist"
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        what = f"cannot be opened ({error})"
    raise CheckpointError(
        f"checkpoint folder {path} {what}; give a local folder with config.json and weights, or the id of a model "
        'on the Hugging Face Hub, such as "llava-hf/llava-1.5-7b-hf"'
    )


def file_inside(folder: Folder, name: str) -> Path:
    """The file called `name` in a checkpoint folder.

    The name must be plain, and the file must really lie there: names come from files that others wrote. The
    exceptions are the cache of the Hugging Face Hub, where `snapshots/<commit>/<name>` links into the `blobs/` of
    the same model (or of the whole cache, where models share files), and a folder opened with `allow_links`.

    Raises:
      CheckpointError: if the name or what it links to leaves the folder, there is no such file, or it is none that can
        be read: a pointer that git-LFS left, a FIFO, a device.
    """
    checkpoint = checkpoint_folder(folder)
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(
            f"file name {name[:200]!r} in {checkpoint} is not a plain name inside the checkpoint folder"
        )
    path = checkpoint / name
    try:
        root, target = checkpoint.path.resolve(), path.resolve()
        if not checkpoint.allow_links and target.parent != root and not _in_hub_cache(root, target):
            raise CheckpointError(
                f"{path} links to {target}, outside the checkpoint folder; if you trust the link, allow it "
                "(load(..., allow_links=True), --allow-links), or copy the file there instead"
            )
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is {kind_of(mode)}, not a plain file; put the checkpoint's own file there")
        with open_plain(target) as stream:
            start = stream.read(len(_POINTER))
    except FileNotFoundError:
        link = f" (it links to {os.readlink(path)}, which does not exist)" if path.is_symlink() else ""
        raise CheckpointError(f"{path} is missing{link}; the checkpoint is incomplete, download it again") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no permission, a name too long
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if start == _POINTER:
        raise CheckpointError(
            f"{path} is a git-LFS pointer, a few lines that stand for the file: the repository was cloned without its "
            "large files. Fetch them with `git lfs install && git lfs pull` in the folder, or download the model anew, "
            "by its id on the Hugging Face Hub"
        )
    return path


def _in_hub_cache(root: Path, target: Path) -> bool:
    # <cache>/models--x--y/snapshots/<commit>/name -> ../../blobs/<hash>, which may link to <cache>/blobs/<2>/<hash>;
    # root may be a folder of the snapshot, too.
    snapshots = next((folder for folder in (root.parent, root.parent.parent) if folder.name == "snapshots"), None)
    if snapshots is None:
        return False
    model = snapshots.parent
    shared = model.parent / "blobs"
    return target.parent == model / "blobs" or (model.name.startswith("models--") and target.parent.parent == shared)


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """The text in a file that `file_inside` found.

    Raises:
      CheckpointError: if the file cannot be read as UTF-8, or has more than `most` bytes.
    """
    try:
        with open_plain(path) as stream:
            raw = stream.read(most + 1)
        if len(raw) > most:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {most} are read")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): download it again") from error


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file that `file_inside` found; see `parse_json`.

    Raises:
      CheckpointError: if the file cannot be read or does not hold a JSON object of at most `most` bytes.
    """
    text = read_text(path, most)
    try:
        value = parse_json(text, most)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def optional_text(folder: Folder, name: str, most: int = TEXT_BYTES) -> str | None:
    """The text of `folder/name`, or None where there is no such file.

    Raises CheckpointError if it cannot be read, has more than `most` bytes, or is a link that leaves the folder.
    """
    checkpoint = checkpoint_folder(folder)
    return read_text(file_inside(checkpoint, name), most) if checkpoint.has(name) else None


def optional_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """The JSON object in `folder/name`, or None where there is no such file.

    Raises CheckpointError if it is malformed, or is a link that leaves the folder.
    """
    checkpoint = checkpoint_folder(folder)
    return read_json(file_inside(checkpoint, name)) if checkpoint.has(name) else None
