"""Compiled programs, kept from one run to the next."""

import os
import tempfile
from pathlib import Path

import jax

from vlcache_jax.errors import InputError


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps every compiled program in a folder, so that the next process reads it instead of compiling.

    This sets JAX's persistent compilation cache for the whole process: `jax_compilation_cache_dir`, and no lower limit
    on the time or size of what is kept. Call it before anything is compiled. The folder holds executable programs: it
    must not be writable for others. JAX never empties it; delete it when it has grown too large.

    Args:
      folder: made where it is missing. By default `$VLCACHE_JAX_CACHE_DIR`, or else `vlcache_jax` in
        `$XDG_CACHE_HOME` (`~/.cache`); the command line keeps its programs there, too.

    Returns:
      The folder.

    Raises:
      InputError: nothing can be written there.

    Example:
      vlc.use_compilation_cache()
    """
    folder = default_folder() if folder is None else Path(folder).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise InputError(f"no compilation cache in {str(folder)!r} ({error}): choose another folder") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def default_folder() -> Path:
    """Where programs are kept if no folder is named."""
    if chosen := os.environ.get("VLCACHE_JAX_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "vlcache_jax"
