"""From what was typed to files; everything wrong is refused before any work."""

import tempfile
from pathlib import Path

from vlcache_jax.errors import InputError
from vlcache_jax.files.writing import check_target, make_folder

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf"}


def check_picture_path(text: str | None) -> Path | None:
    """The path of a picture to write, or None where none is asked for.

    Raises InputError if it is no kind of picture, or cannot be written there.
    """
    if text is None:
        return None
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise InputError(
            f"--explain {text!r}: {path.suffix or 'no ending'!r} is no known image format: use .png, .jpg or .webp"
        )
    check_target(path)
    check_writable(path.parent, f"--explain {text!r}")
    return path


def output_folder(text: str, option: str) -> Path:
    """The folder to write into, which is made where it is missing.

    Raises InputError if that is not possible, or nothing can be written there.
    """
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {text!r} is a file: give a folder")
    make_folder(folder)
    check_writable(folder, f"{option} {text!r}")
    return folder


def check_writable(folder: Path, what: str) -> None:
    """Raises InputError, which begins with `what`, if no file can be written in a folder: found before a long run."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written there ({error.strerror}): choose another path") from error
