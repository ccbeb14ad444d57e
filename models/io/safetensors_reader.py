"""Lazy, zero-copy access to a folder of safetensors files.

The files are mapped into memory and tensors are views of the mapping, so only what is read is loaded;
bfloat16 comes out as bfloat16, which the numpy side of the safetensors package cannot do. Headers come from
files that others wrote: they are checked in full before anything is viewed.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import TABLE_BYTES, TENSOR_AXES, TENSOR_NAME, TENSOR_SIDE
from vlcache_jax.files.reading import open_plain
from vlcache_jax.models.io.files import Folder, checkpoint_folder, file_inside, read_json
from vlcache_jax.models.io.unsupported import no_weights

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Element types a parameter can be read from, by their name in the file."""

# Known to the format but never read: only their size is needed, to check the header.
_OTHER_BITS = {
    "BOOL": 8,
    "I8": 8,
    "U8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_COMPARED = 2**24  # bytes of two tensors compared at a time


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; already checked against the file's size."""

    name: str
    file: str
    dtype: str  # the format's name: "BF16", "F32", ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


class SafetensorsFolder:
    """The tensors of a checkpoint folder: `model.safetensors`, or the shards its index names.

    Attributes:
      folder: Where they lie.
      tensors: What the headers say, by tensor name.
    """

    def __init__(self, folder: Folder) -> None:
        """Reads and checks the headers. Tensor data are read of tensors alone that are there twice.

        Warns if the index names a wrong shard for a tensor that another one holds, or if two shards hold a tensor with
        the same bytes: what is loaded is right all the same.

        Raises:
          CheckpointError: if files are missing, corrupt, truncated, or named outside the folder, or two shards hold
            different tensors of one name.
        """
        self.folder = checkpoint_folder(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[str, np.memmap] = {}
        listed = self._files()
        files = sorted(set(listed.values())) if listed else [SINGLE_FILE]
        for file in files:
            self._add(file, listed)
        if any(name not in self.tensors for name in listed):
            for path in sorted(self.folder.path.glob("model-*.safetensors")):  # shards that the index forgot
                if path.name not in files:
                    self._add(path.name, listed, wanted=listed.keys() - self.tensors.keys())
        misplaced = [name for name, file in listed.items() if name in self.tensors and self.tensors[name].file != file]
        for name, file in listed.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.folder / INDEX_FILE} places tensor {_quoted(name)} in {file}, which does not hold it, nor "
                    "does another shard; the files are not from the same download"
                )
        if misplaced:
            name = misplaced[0]
            warnings.warn(
                f"{self.folder / INDEX_FILE} names the wrong file for {len(misplaced)} tensors, such as "
                f"{_quoted(name)}: it says {listed[name]}, {self.tensors[name].file} holds it and is read",
                stacklevel=2,
            )

    def _add(self, file: str, listed: dict[str, str], wanted: Any = None) -> None:
        """Takes in the tensors of a file: all, or those `wanted`."""
        for info in read_header(file_inside(self.folder, file))[0]:
            if wanted is not None and info.name not in wanted:
                continue
            other = self.tensors.get(info.name)
            if other is not None:
                if not self.same_bytes(other, info):
                    raise CheckpointError(
                        f"tensor {_quoted(info.name)} is both in {other.file} and in {file} of {self.folder}, and the "
                        "two differ; the files are not from the same download"
                    )
                warnings.warn(
                    f"tensor {_quoted(info.name)} is both in {other.file} and in {file} of {self.folder}, with the "
                    "same bytes",
                    stacklevel=3,
                )
            if other is None or listed.get(info.name) == file:
                self.tensors[info.name] = info

    def _files(self) -> dict[str, str]:
        """Tensor name -> shard, from the index; empty if there is one single file."""
        if self.folder.has(SINGLE_FILE):
            return {}
        if not self.folder.has(INDEX_FILE):
            raise no_weights(self.folder)
        path = file_inside(self.folder, INDEX_FILE)
        listed = read_json(path, TABLE_BYTES).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{path} has no 'weight_map' of tensor names to file names")
        return listed

    def same_bytes(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors are equal, bit for bit."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        a, b = self._bytes(one), self._bytes(other)
        return all(np.array_equal(a[i : i + _COMPARED], b[i : i + _COMPARED]) for i in range(0, len(a), _COMPARED))

    def view(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the mapped file; bytes are read when they are used.

        Raises:
          CheckpointError: if its element type is not one of `DTYPES`.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {self.folder / info.file} has dtype {info.dtype}; "
                f"supported: {', '.join(DTYPES)} (quantised checkpoints are not)"
            )
        return self._bytes(info).view(DTYPES[info.dtype]).reshape(info.shape)

    def _bytes(self, info: TensorInfo) -> np.ndarray:
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(file_inside(self.folder, info.file), np.uint8, mode="r")
        return np.asarray(self._maps[info.file][info.start : info.stop])


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, Any]]:
    """The tensors of a safetensors file, checked against its size, and its metadata, unchecked.

    Raises:
      CheckpointError: if the file is missing, no plain file, corrupt, truncated, or beyond the limits of
        `vlcache_jax.files.limits`.
    """
    try:
        with open_plain(path) as stream:
            return parse_header(path, stream)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def parse_header(
    path: Path, stream: BinaryIO, remedy: str = "download it again"
) -> tuple[list[TensorInfo], dict[str, Any]]:
    """`read_header` of an open file; its path and a remedy are for messages. Raises OSError, too."""

    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a valid safetensors file: {why}; {remedy}")

    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise corrupt(f"its header claims {length} bytes, the file has {size}")
    if length > TABLE_BYTES:
        raise CheckpointError(f"{path} has a header of {length} bytes; at most {TABLE_BYTES} are read")
    raw = stream.read(length)
    try:
        header = parse_json(raw, TABLE_BYTES)
    except ValueError as error:
        raise corrupt(f"its header is not JSON that can be read ({error})") from error
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}

    infos = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(dtype, str) or not isinstance(shape, list):
                raise ValueError("malformed")
            if len(name) > TENSOR_NAME or len(shape) > TENSOR_AXES:
                raise ValueError("beyond the limits")
            if not all(type(n) is int and 0 <= n <= TENSOR_SIDE for n in (*shape, start, stop)):
                raise ValueError("sizes must be whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(f"tensor {_quoted(name)} is described as {shorten(entry, 200)}") from error
        bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS.get(dtype)
        if bits is None:
            raise CheckpointError(
                f"{path}: tensor {_quoted(name)} has the element type {shorten(dtype)}, which is not known; parameters "
                f"can be {', '.join(DTYPES)}: convert the checkpoint to one of them"
            )
        if (stop - start) * 8 != math.prod(shape) * bits:
            raise corrupt(f"tensor {_quoted(name)} of {dtype} {shape} cannot fill bytes {start} to {stop}")
        infos.append(TensorInfo(name, path.name, dtype, tuple(shape), 8 + length + start, 8 + length + stop))

    # The format allows no gap and no overlap, so a truncated file cannot pass.
    end = 8 + length
    for info in sorted(infos, key=lambda i: (i.start, i.stop)):
        if info.start != end:
            raise corrupt(f"tensor {_quoted(info.name)} starts at byte {info.start}, expected {end}")
        end = info.stop
    if end != size:
        raise corrupt(f"its tensors end at byte {end}, the file at {size} (truncated, or something was appended)")
    return infos, metadata


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:197]}...")
