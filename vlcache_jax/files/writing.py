"""The one place that writes files: whole or not at all, and only over plain files.

A file gets its name by one rename, when all of it is on the disk. Whoever is killed on the way leaves the old file and
a temporary one, which the next writer in the same folder removes. What is not a plain file (a link, a folder, a device,
a FIFO, a socket) is neither replaced nor written to.
"""

import contextlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlcache_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.vlcache-jax-[0-9a-f]{16}\.tmp")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
# Where the system has them: follow no link, wait for no reader of a FIFO, and hand nothing on to other programs.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def check_target(path: str | os.PathLike[str]) -> int | None:
    """Whether a file can be put at `path`.

    Returns:
      The permissions of the file that is there; None if there is none.

    Raises:
      InputError: its folder does not exist, or what is there is no plain file.
    """
    path = Path(path)
    with _writing(path):
        if not path.parent.is_dir():
            raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist; create it first")
        try:
            found = os.lstat(path).st_mode
        except FileNotFoundError:
            return None
        except ValueError as error:  # a NUL in the name
            raise InputError(f"{str(path)!r} cannot be written: {error}; choose another path") from error
        if stat.S_ISLNK(found):
            raise InputError(
                f"{path} cannot be written: it is a link to {os.readlink(path)}, and links are not followed; give the "
                "path of the file itself, or remove the link"
            )
        if not stat.S_ISREG(found):
            raise InputError(f"{path} cannot be written: it is {kind_of(found)}, not a plain file; give another path")
        return stat.S_IMODE(found)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file at `path` when the block ends without an error.

    The permissions of a file that is replaced stay; those of a new one follow the umask.

    Raises:
      InputError: see `check_target`; or the disk is full, the folder is not writable, ... The old file is untouched.

    Example:
      with replacing("answers.txt") as stream:
          stream.write(b"42")
    """
    path = Path(path)
    permissions = check_target(path)
    with _writing(path):
        _remove_leftovers(path.parent)
        stream, temporary = _temporary(path.parent, permissions)
        try:
            with stream:
                if permissions is not None and hasattr(os, "fchmod"):
                    os.fchmod(stream.fileno(), permissions)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                check_target(path)  # as it may have become something else since
                if fcntl is None:
                    stream.close()  # Windows renames no open file; elsewhere the lock is held until it has its name
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes `data` the file at `path`; see `replacing`."""
    with replacing(path) as stream:
        stream.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Makes `text`, in UTF-8, the file at `path`; see `replacing`."""
    write_bytes(path, text.encode())


def write_picture(path: str | os.PathLike[str], picture: Any, **options: Any) -> None:
    """Makes a PIL image the file at `path`, in the format of its ending; see `replacing`.

    Args:
      path: ending in .png, .jpg, .webp or what else Pillow writes.
      picture: the `PIL.Image.Image`.
      options: of Pillow's `save`.

    Raises:
      InputError: besides, Pillow cannot write such a file.
    """
    from PIL import Image  # not at the top: writing anything else needs no Pillow

    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    encoded = io.BytesIO()
    try:
        if kind is None:
            raise ValueError("its ending is that of no image format")
        picture.save(encoded, format=kind, **options)
    except (OSError, ValueError, KeyError) as error:  # KeyError: a format that is only read
        raise InputError(f"{path} cannot be written ({error}): use .png, .jpg or .webp") from error
    write_bytes(path, encoded.getvalue())


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Appends a line, in UTF-8, to the file at `path`, which is created if need be; it is on the disk afterwards.

    An unfinished last line, of a writer that was killed, stays a line of its own.

    Raises:
      InputError: see `replacing`.
    """
    path = Path(path)
    check_target(path)
    with _writing(path), _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as descriptor:
        size = os.fstat(descriptor).st_size
        data = line.encode() + b"\n"
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            data = data if os.read(descriptor, 1) == b"\n" else b"\n" + data
        with os.fdopen(os.dup(descriptor), "ab") as stream:
            stream.write(data)
        os.fsync(descriptor)


def cut(path: str | os.PathLike[str], size: int) -> None:
    """Cuts off what follows the first `size` bytes of the file at `path`.

    Raises:
      InputError: see `replacing`.
    """
    path = Path(path)
    check_target(path)
    with _writing(path), _opened(path, os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes the plain file at `path`, if there is one.

    Raises:
      InputError: see `replacing`.
    """
    path = Path(path)
    if check_target(path) is not None:
        with _writing(path):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder of this library's own and what is in it, of a link the link only; leaves what it cannot."""
    shutil.rmtree(path, ignore_errors=True)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates the folder `path`, and those above it, if need be.

    Raises:
      InputError: that cannot be done.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the folder {path} cannot be created ({error}): choose another one") from error
    return path


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps other programs from writing a set of files into the same folder at the same time.

    Where the file system knows no locks, nothing is kept.

    Raises:
      InputError: another program is writing there.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another program is saving into {folder}: wait for it, or choose another one") from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Brings renamed and removed names to the disk, as far as the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def kind_of(mode: int) -> str:
    """What a mode of `os.stat` is, in words.

    Example:
      >>> kind_of(stat.S_IFIFO)
      'a FIFO'
    """
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names the file in errors of the system."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error}; free some space or choose another path") from error


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | _CAREFUL, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):  # it was a plain file a moment ago
            raise InputError(f"{path} cannot be written: it is {kind_of(mode)}, not a plain file; give another path")
        yield descriptor
    finally:
        os.close(descriptor)


def _temporary(folder: Path, permissions: int | None) -> tuple[BinaryIO, Path]:
    """A new file, locked as long as its writer lives."""
    while True:
        path = folder / f".vlcache-jax-{secrets.token_hex(8)}.tmp"
        descriptor = os.open(path, _NEW | _CAREFUL, 0o666 if permissions is None else permissions & 0o777)
        stream = os.fdopen(descriptor, "wb")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink == 0:  # taken for a leftover before it was locked
                stream.close()
                continue
        return stream, path


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files whose writers are dead: nobody holds their locks."""
    if fcntl is None:
        return
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    for name in names:
        with contextlib.suppress(OSError, InputError), _opened(folder / name, os.O_RDWR) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(folder / name)
