"""Lazy, zero-copy access to a folder of safetensors files.

The files are mapped into memory and tensors are views of the mapping, so only what is read is loaded;
bfloat16 comes out as bfloat16, which the numpy side of the safetensors package cannot do. Headers come from
files that others wrote: they are checked in full before anything is viewed.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.checkpoint.files import checkpoint_folder, file_inside, read_json

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
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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

    def __init__(self, folder: str | Path) -> None:
        """Reads and checks the headers; no tensor data is read.

        Raises:
          CheckpointError: if files are missing, corrupt, truncated, or named outside the folder.
        """
        self.folder = checkpoint_folder(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[str, np.memmap] = {}
        listed = self._files()
        for file in sorted(set(listed.values())) if listed else [SINGLE_FILE]:
            for info in read_header(file_inside(self.folder, file))[0]:
                if info.name in self.tensors:
                    other = self.tensors[info.name].file
                    raise CheckpointError(f"tensor {info.name!r} is both in {other} and in {file} of {self.folder}")
                self.tensors[info.name] = info
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise CheckpointError(
                    f"{self.folder / INDEX_FILE} places tensor {name!r} in {file}, which does not hold it; "
                    "the files are not from the same download"
                )

    def _files(self) -> dict[str, str]:
        """Tensor name -> shard, from the index; empty if there is one single file."""
        if (self.folder / SINGLE_FILE).exists():
            return {}
        if not (self.folder / INDEX_FILE).exists():
            raise CheckpointError(self._nothing_found())
        path = file_inside(self.folder, INDEX_FILE)
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise CheckpointError(f"{path} has no 'weight_map' of tensor names to file names")
        return listed

    def _nothing_found(self) -> str:
        pickled = sorted(f.name for f in self.folder.iterdir() if f.suffix in _PICKLED)
        if pickled:
            return (
                f"{self.folder} has weights only as {', '.join(pickled)}; such files are pickled and can run "
                "code when read, so they are refused. Convert them once: load the model with transformers in "
                "an environment you trust and call save_pretrained(folder), which writes safetensors"
            )
        return f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights there"

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
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(file_inside(self.folder, info.file), np.uint8, mode="r")
        data = self._maps[info.file][info.start : info.stop]
        return np.asarray(data).view(DTYPES[info.dtype]).reshape(info.shape)


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, Any]]:
    """The tensors of a safetensors file, checked against its size, and its metadata, unchecked.

    Raises:
      CheckpointError: if the file is missing, corrupt or truncated.
    """

    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a valid safetensors file: {why}; download it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise corrupt(f"its header claims {length} bytes, the file has {size}")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}

    infos = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
                raise ValueError("sizes must be whole numbers")
            bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(f"tensor {name!r} is described as {str(entry)[:200]}") from error
        if (stop - start) * 8 != math.prod(shape) * bits:
            raise corrupt(f"tensor {name!r} of {dtype} {shape} cannot fill bytes {start} to {stop}")
        infos.append(TensorInfo(name, path.name, dtype, tuple(shape), 8 + length + start, 8 + length + stop))

    # The format allows no gap and no overlap, so a truncated file cannot pass.
    end = 8 + length
    for info in sorted(infos, key=lambda i: (i.start, i.stop)):
        if info.start != end:
            raise corrupt(f"tensor {info.name!r} starts at byte {info.start}, expected {end}")
        end = info.stop
    if end != size:
        raise corrupt(f"its tensors end at byte {end}, the file at {size} (truncated, or something was appended)")
    return infos, metadata
