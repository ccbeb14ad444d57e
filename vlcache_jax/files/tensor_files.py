"""Files of named arrays with a description: what contexts and train states are saved as.

They are safetensors files. Their metadata hold two texts: a JSON object, under the name of the kind of file, with its
version, a checksum of every array, and what else the kind describes; and the checksum of that text. So every bit of the
file is checked when it is read, before anything is used. Files may come from others: nothing in them is run.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import TABLE_BYTES, TENSOR_AXES, TENSOR_NAME
from vlcache_jax.files.reading import open_plain
from vlcache_jax.files.safetensors import (
    DTYPES,
    NAMES,
    Entry,
    TensorInfo,
    as_bytes,
    dtype_name,
    parse_header,
    to_host,
    write_tensors,
)
from vlcache_jax.files.writing import replacing


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: in the metadata, such as "vlcache_jax.inference.context".
      title: in messages, such as "context".
      version: that is written and read.
      remedy: what to do about a file that cannot be read, such as "save it again".
      has: what files of earlier versions lack.
    """

    name: str
    title: str
    version: int
    remedy: str
    has: str = "checksums"


def write_tensor_file(
    path: str | os.PathLike[str], kind: Kind, description: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Writes a file, whole or not at all.

    Arrays come to the host one at a time, twice: for their checksums, and to be written.

    Args:
      path: of the file; its folder must exist.
      kind: of the file.
      description: a JSON object, without the keys "version" and "checksums".
      arrays: JAX or NumPy arrays by name.

    Raises:
      InputError: the file cannot be written (see `files.writing`) or could not be read again: an array is of a
        type that the format does not know, such as a typed PRNG key, or something is beyond `vlcache_jax.files.limits`.
    """
    entries, checksums = [], {}
    for name, x in arrays.items():
        dtype_name(name, x)
        if len(name) > TENSOR_NAME or len(x.shape) > TENSOR_AXES:
            raise InputError(
                f"{name[:200]} has {len(x.shape)} axes and a name of {len(name)} characters; a file holds arrays of up "
                f"to {TENSOR_AXES} axes, with names of up to {TENSOR_NAME} characters"
            )
        entries.append(Entry(name, np.dtype(x.dtype), tuple(x.shape)))
        checksums[name] = _checksum(entries[-1], as_bytes(to_host(name, x)))
    text = json.dumps({**description, "version": kind.version, "checksums": checksums}, sort_keys=True)
    try:
        parse_json(text, TABLE_BYTES // 4)
    except ValueError as error:
        raise InputError(
            f"the description of a {kind.title} could not be read again: {error}; keep it smaller"
        ) from error
    metadata = {kind.name: text, f"{kind.name}.checksum": hashlib.sha256(text.encode()).hexdigest()}
    with replacing(path) as stream:
        write_tensors(stream, entries, (to_host(name, x) for name, x in arrays.items()), metadata)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A file whose header has been read and checked; `arrays` reads the rest.

    Attributes:
      path: of the file.
      kind: of the file.
      description: as it was written, without the version and the checksums.
    """

    path: Path
    kind: Kind
    description: dict[str, Any]
    _infos: tuple[TensorInfo, ...]
    _checksums: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: Kind) -> "TensorFile":
        """Reads the header.

        Raises:
          CheckpointError: there is no such file, it is not a plain file, not of this kind or version, or its header
            is damaged.
        """
        path = Path(path)
        try:
            with open_plain(path) as stream:
                infos, metadata = parse_header(path, stream, kind.remedy)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        text = metadata.get(kind.name)
        if not isinstance(text, str):
            raise CheckpointError(
                f"{path} holds no {kind.title}: its metadata lack {kind.name!r}; give a file that was saved as one"
            )
        try:
            description = parse_json(text, TABLE_BYTES)
        except ValueError as error:
            raise _damaged(path, kind, f"its description is not JSON ({error})") from error
        if not isinstance(description, dict):
            raise _damaged(path, kind, "its description is not an object")
        version = description.pop("version", None)
        if version != kind.version:
            raise CheckpointError(
                f"{path} is a {kind.title} of format version {shorten(version)}, this library reads version "
                f"{kind.version} (which has {kind.has}): {kind.remedy}, or use the release of vlcache_jax that saved it"
            )
        if metadata.get(f"{kind.name}.checksum") != hashlib.sha256(text.encode()).hexdigest():
            raise _damaged(path, kind, "its description has not the checksum it was saved with")
        checksums = description.pop("checksums", None)
        names = {info.name for info in infos}
        if not isinstance(checksums, dict) or set(checksums) != names:
            raise _damaged(path, kind, f"its checksums are not those of its {len(names)} arrays")
        return cls(path, kind, description, tuple(infos), checksums)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by its name.

        Raises:
          CheckpointError: one of them is damaged, or of a type that this library never writes.
        """
        found = {}
        try:
            with open_plain(self.path) as stream:
                for info in self._infos:
                    if info.dtype not in DTYPES:
                        raise self.damaged(
                            f"array {info.name!r} has dtype {info.dtype}, which no {self.kind.title} has"
                        )
                    data = np.empty(info.stop - info.start, np.uint8)
                    stream.seek(info.start)
                    stream.readinto(data.data)  # type: ignore[attr-defined]
                    dtype = DTYPES[info.dtype]
                    entry = Entry(info.name, dtype, info.shape)
                    if _checksum(entry, data.data) != self._checksums[info.name]:
                        raise self.damaged(f"array {info.name!r} has not the checksum it was saved with")
                    if dtype == np.bool_ and data.size and data.max() > 1:
                        raise self.damaged(f"array {info.name!r} of booleans holds other numbers than 0 and 1")
                    found[info.name] = data.view(dtype).reshape(info.shape)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        return found

    def damaged(self, why: str) -> CheckpointError:
        """The error to raise for contents that cannot be."""
        return _damaged(self.path, self.kind, why)


def _damaged(path: Path, kind: Kind, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid {kind.title}: {why}; {kind.remedy}")


def _checksum(entry: Entry, data: Any) -> str:
    """SHA-256 of an array's name, type, shape and elements."""
    digest = hashlib.sha256(json.dumps([entry.name, NAMES[entry.dtype], list(entry.shape)]).encode())
    digest.update(data)
    return digest.hexdigest()
