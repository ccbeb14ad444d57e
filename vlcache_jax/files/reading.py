"""Reading files that others may have written: only plain files, and without waiting."""

import errno
import os
import stat
from typing import BinaryIO

from vlcache_jax.files.writing import kind_of


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a plain file, or a link to one, for reading. It never waits, as opening a FIFO would.

    Raises:
      OSError: there is no such file, it is not a plain file, or it may not be read.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            stream = os.fdopen(os.open(path, os.O_RDONLY | flags), "rb")
            mode = os.fstat(stream.fileno()).st_mode
            if stat.S_ISREG(mode):  # still
                return stream
            stream.close()
    except ValueError as error:  # a name that no system takes, with a NUL, say
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a plain file", os.fspath(path))


def read_plain(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a plain file. Raises OSError, see `open_plain`."""
    with open_plain(path) as stream:
        return stream.read()
