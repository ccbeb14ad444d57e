"""From what was typed to files; everything wrong is refused before any work."""

import argparse
import math
import tempfile
from pathlib import Path

import jax
from jax.sharding import AxisType

from vlcache_jax.errors import InputError
from vlcache_jax.files.writing import check_target, make_folder
from vlcache_jax.terminal import words

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


def mesh_axes(text: str) -> dict[str, int]:
    """The sizes of "data=2,model=4". Raises InputError for anything else."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        try:
            wanted = words.whole(1)(size)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--mesh {words.shown(text)} is not of the form data=2,model=4: {error}") from None
        if name in axes:
            raise InputError(f"--mesh {words.shown(text)} names {name!r} twice")
        axes[name] = wanted
    return axes


def device_mesh(text: str) -> jax.sharding.Mesh:
    """A mesh of all devices of this process with these axes. Raises InputError if it does not fit them."""
    axes, devices = mesh_axes(text), jax.local_devices()
    count = math.prod(axes.values())
    if count != len(devices):
        raise InputError(f"--mesh {words.shown(text)} is of {count} devices: JAX sees {len(devices)}")
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
