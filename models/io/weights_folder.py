"""Lazy, zero-copy access to the safetensors files of a checkpoint.

The files are mapped into memory and tensors are views of the mapping, so only what is read is loaded;
bfloat16 comes out as bfloat16, which the numpy side of the safetensors package cannot do.
"""

import warnings
from typing import Any

import numpy as np

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.limits import TABLE_BYTES
from vlcache_jax.files.safetensors import DTYPES, FLOATS, TensorInfo, quoted, read_header
from vlcache_jax.models.io.files import Folder, checkpoint_folder, file_inside, read_json
from vlcache_jax.models.io.unsupported import no_weights

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_COMPARED = 2**24  # bytes of two tensors compared at a time


class SafetensorsFolder:
    """The tensors of a checkpoint folder: `model.safetensors`, or the shards its index names.

    Attributes:
      folder: Where they lie.
      tensors: What the headers say, by tensor name.
    """

    def __init__(self, folder: Folder, single: str = SINGLE_FILE) -> None:
        """Reads and checks the headers. Tensor data are read of tensors alone that are there twice.

        Args:
          folder: the checkpoint's.
          single: the file that holds all tensors, where there is no index.

        Warns if the index names a wrong shard for a tensor that another one holds, or if two shards hold a tensor with
        the same bytes: what is loaded is right all the same.

        Raises:
          CheckpointError: if files are missing, corrupt, truncated, or named outside the folder, or two shards hold
            different tensors of one name.
        """
        self.folder, self._single = checkpoint_folder(folder), single
        self.tensors: dict[str, TensorInfo] = {}
        listed = self._files()
        files = sorted(set(listed.values())) if listed else [single]
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
                    f"{self.folder / INDEX_FILE} places tensor {quoted(name)} in {file}, which does not hold it, nor "
                    "does another shard; the files are not from the same download"
                )
        if misplaced:
            name = misplaced[0]
            warnings.warn(
                f"{self.folder / INDEX_FILE} names the wrong file for {len(misplaced)} tensors, such as "
                f"{quoted(name)}: it says {listed[name]}, {self.tensors[name].file} holds it and is read",
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
                        f"tensor {quoted(info.name)} is both in {other.file} and in {file} of {self.folder}, and the "
                        "two differ; the files are not from the same download"
                    )
                warnings.warn(
                    f"tensor {quoted(info.name)} is both in {other.file} and in {file} of {self.folder}, with the "
                    "same bytes",
                    stacklevel=3,
                )
            if other is None or listed.get(info.name) == file:
                self.tensors[info.name] = info

    def _files(self) -> dict[str, str]:
        """Tensor name -> shard, from the index; empty if there is one single file."""
        if self.folder.has(self._single):
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

    def packed(self, name: str) -> None:
        """The packed weight that `name` stands for: none, see `packed.folder.PackedFolder`."""
        return None

    def raw(self, name: str) -> np.ndarray:
        """The tensor `name` as `view` gives it, of any element type of `DTYPES`."""
        info = self.tensors[name]
        return self._bytes(info).view(DTYPES[info.dtype]).reshape(info.shape)

    def view(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the mapped file; bytes are read when they are used.

        Raises:
          CheckpointError: if its element type is not one of `FLOATS`.
        """
        info = self.tensors[name]
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name!r} in {self.folder / info.file} has dtype {info.dtype}; "
                f"supported: {', '.join(FLOATS)} (quantised checkpoints are not)"
            )
        return self.raw(name)

    def _bytes(self, info: TensorInfo) -> np.ndarray:
        if info.start == info.stop:
            return np.empty(0, np.uint8)
        # A mapping of its own, which goes with the view: pages that were read count as memory of this process.
        path, size = file_inside(self.folder, info.file), info.stop - info.start
        return np.asarray(np.memmap(path, np.uint8, mode="r", offset=info.start, shape=(size,)))
