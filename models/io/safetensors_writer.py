"""Writing named arrays in the safetensors format (https://huggingface.co/docs/safetensors/index#format)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.models.io.copying import copy_cast

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
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data are aligned in a mapped file
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for _, tensor in zip(entries, tensors, strict=False):
        stream.write(as_bytes(tensor))


def as_bytes(tensor: np.ndarray) -> memoryview:
    """The elements of an array, in order."""
    if not tensor.flags.c_contiguous:
        contiguous = np.empty(tensor.shape, tensor.dtype)
        copy_cast(contiguous, tensor)
        tensor = contiguous
    return tensor.reshape(-1).view(np.uint8).data


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
