"""The safetensors format: https://huggingface.co/docs/safetensors/index#format.

Headers come from files that others wrote: they are checked in full before anything is viewed.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import TABLE_BYTES, TENSOR_AXES, TENSOR_NAME, TENSOR_SIDE
from vlcache_jax.files.reading import open_plain

NAMES = {
    np.dtype(np.bool_): "BOOL",
    **{np.dtype(f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
    **{np.dtype(f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
    **{np.dtype(f"float{bits}"): f"F{bits}" for bits in (16, 32, 64)},
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(jnp.float8_e4m3fn): "F8_E4M3",
    np.dtype(jnp.float8_e5m2): "F8_E5M2",
}
"""The format's names of the element types that can be written."""

DTYPES = {name: dtype for dtype, name in NAMES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Of parameters: all others are known to the format, but no checkpoint that is read has them."""

_OTHER_BITS = {
    "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Element types that are never read: only their size is needed, to check the header."""

_BLOCK = 256  # rows and columns of a transposed matrix that are copied together


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; already checked against the file's size."""

    name: str
    file: str
    dtype: str  # the format's name: "BF16", "F32", ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


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
            raise corrupt(f"tensor {quoted(name)} is described as {shorten(entry, 200)}") from error
        bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS.get(dtype)
        if bits is None:
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} has the element type {shorten(dtype)}, which is not known; parameters "
                f"can be {', '.join(FLOATS)}: convert the checkpoint to one of them"
            )
        if (stop - start) * 8 != math.prod(shape) * bits:
            raise corrupt(f"tensor {quoted(name)} of {dtype} {shape} cannot fill bytes {start} to {stop}")
        infos.append(TensorInfo(name, path.name, dtype, tuple(shape), 8 + length + start, 8 + length + stop))

    # The format allows no gap and no overlap, so a truncated file cannot pass.
    end = 8 + length
    for info in sorted(infos, key=lambda i: (i.start, i.stop)):
        if info.start != end:
            raise corrupt(f"tensor {quoted(info.name)} starts at byte {info.start}, expected {end}")
        end = info.stop
    if end != size:
        raise corrupt(f"its tensors end at byte {end}, the file at {size} (truncated, or something was appended)")
    return infos, metadata


def quoted(name: str) -> str:
    """A tensor's name in messages."""
    return repr(name if len(name) <= 200 else f"{name[:197]}...")


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    stream: BinaryIO, entries: Sequence[Entry], tensors: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file: its header, then the tensors, each of which is asked for when the one before is written.

    Args:
      stream: of `vlcache_jax.files.writing.replacing`.
      entries: what the header says.
      tensors: in the same order; no more are taken than there are entries.
      metadata: text by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data are aligned in a mapped file
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for _, tensor in zip(entries, tensors, strict=False):
        stream.write(as_bytes(tensor))


def copy_cast(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source`, cast to `out`'s dtype.

    A transposed matrix is copied block by block: row by row, every element would miss the cache (3x slower for the
    matrices of a 7B model).
    """
    if source.ndim != 2 or source.flags.c_contiguous:
        out[...] = source
        return
    for row in range(0, out.shape[0], _BLOCK):
        for column in range(0, out.shape[1], _BLOCK):
            block = np.s_[row : row + _BLOCK, column : column + _BLOCK]
            out[block] = source[block]


def as_bytes(tensor: np.ndarray) -> memoryview:
    """The elements of an array, in order."""
    if not tensor.flags.c_contiguous:
        contiguous = np.empty(tensor.shape, tensor.dtype)
        copy_cast(contiguous, tensor)
        tensor = contiguous
    return tensor.reshape(-1).view(np.uint8).data


def dtype_name(name: str, x: Any) -> str:
    """The format's name of an array's element type.

    Raises:
      InputError: it has none, as that of a typed PRNG key.
    """
    if x.dtype not in NAMES:
        raise InputError(
            f"{name} has dtype {x.dtype}, which no file holds: convert it first, a PRNG key by jax.random.key_data"
        )
    return NAMES[x.dtype]


def to_host(name: str, x: Any) -> np.ndarray:
    """An array as NumPy's.

    Raises:
      InputError: it lies on devices of other processes, too.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise InputError(
            f"{name} is spread over several processes: gather it with jax.experimental.multihost_utils."
            "process_allgather(..., tiled=True) and save it from one process"
        )
    return np.asarray(jax.device_get(x))
