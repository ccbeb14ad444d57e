"""The tensors of a checkpoint with packed weights, as if these were floats, and their codes for whoever takes codes."""

import dataclasses
from typing import Any

import numpy as np

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.safetensors import FLOATS, TensorInfo
from vlcache_jax.models.io.files import Folder
from vlcache_jax.models.io.packed.scheme import Scheme
from vlcache_jax.models.io.packed.words import signed, unpack
from vlcache_jax.models.io.weights_folder import SafetensorsFolder

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in its word of each of eight neighbouring features
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point"),
}
_OPTIONAL = ("g_idx", "weight_zero_point", "weight_g_idx")
_IGNORED = ("input_scale", "input_zero_point")  # of activations, which stay floats here


class PackedFolder:
    """A `SafetensorsFolder` in which packed weights are tensors "<name>.weight", F32 [features, channels].

    Attributes:
      folder: where they lie.
      tensors: what the headers say, and of packed weights what they unpack to.
    """

    def __init__(self, reader: SafetensorsFolder, scheme: Scheme) -> None:
        """Checks that the parts of every packed weight are there and fit together.

        Raises:
          CheckpointError: they do not; the message names the tensor.
        """
        self.folder, self.reader = reader.folder, reader
        self.tensors = dict(reader.tensors)
        self._packed: dict[str, PackedWeight] = {}
        first = _PARTS[scheme.layout][0]
        for name, info in reader.tensors.items():
            base, _, part = name.rpartition(".")
            if part != first or info.dtype not in ("I32", "I8"):
                continue
            parts = {part: f"{base}.{part}" for part in _PARTS[scheme.layout] if f"{base}.{part}" in reader.tensors}
            for part in (*parts, *_IGNORED):
                self.tensors.pop(f"{base}.{part}", None)
            packed = PackedWeight(reader, f"{base}.weight", scheme, parts)
            self._packed[packed.name] = packed
            self.tensors[packed.name] = TensorInfo(packed.name, info.file, "F32", packed.shape, 0, 0)

    def same_bytes(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors are equal, bit for bit; no packed one is taken to be."""
        return not {one.name, other.name} & self._packed.keys() and self.reader.same_bytes(one, other)

    def view(self, name: str) -> np.ndarray:
        """A tensor; of a packed weight what it stands for, f32 [features, channels]."""
        return self._packed[name].floats() if name in self._packed else self.reader.view(name)

    def packed(self, name: str) -> "PackedWeight | None":
        """The packed weight that `name` stands for."""
        return self._packed.get(name)


@dataclasses.dataclass
class PackedWeight:
    """One linear weight, [features, channels]: `(codes - zeros) * scales`, by groups of channels.

    Attributes:
      name: "<module>.weight".
      coding: of its codes.
      shape: (features, channels).
      ordered: whether groups are consecutive channels; otherwise it has no codes that a `WeightCoding` describes.
    """

    reader: SafetensorsFolder
    name: str
    scheme: Scheme
    parts: dict[str, str]

    def __post_init__(self) -> None:
        layout, self.coding = self.scheme.layout, self.scheme.coding
        bits, shifted = self.coding.bits, self.coding.shifted
        names = [part for part in _PARTS[layout] if part not in _OPTIONAL]
        if shifted and layout.endswith("quantized"):
            names.append("weight_zero_point")
        for part in names:
            if part not in self.parts:
                raise self._error(f"its {part} is missing")
        rows, columns = self._shape(_PARTS[layout][0])
        per = 32 // bits
        if layout == "awq":
            self.shape = (columns * per, rows)
        elif layout.startswith("gptq"):
            self.shape = (columns, rows * per)
        else:
            self.shape = (rows, columns)
            if layout == "pack-quantized":
                shape = self._read("weight_shape", "I64", (2,)).tolist()
                if shape[0] != rows or columns != -(-shape[1] // per):
                    raise self._error(f"weight_shape {shape} does not fit weight_packed {[rows, columns]}")
                self.shape = (rows, shape[1])
        channels = self.shape[1]
        size = channels if self.coding.group is None else self.coding.group
        if channels % size:
            raise self._error(f"groups of {size} do not divide its {channels} channels")
        self.groups = channels // size
        order = np.arange(channels) // size
        named = next((part for part in ("g_idx", "weight_g_idx") if part in self.parts), None)
        self.group_of = order if named is None else self._read(named, "I32", (channels,)).astype(np.int64)
        if self.group_of.min(initial=0) < 0 or self.group_of.max(initial=0) >= self.groups:
            raise self._error(f"its {named} names groups that there are none of")
        self.ordered = bool((self.group_of == order).all())
        self._check_tables()

    def codes(self, features: slice, channels: slice) -> np.ndarray:
        """i8 [features, channels]."""
        bits, layout = self.coding.bits, self.scheme.layout
        words = self.reader.raw(self.parts[_PARTS[layout][0]])
        if layout == "int-quantized":
            return words[features, channels]
        if layout == "awq":
            return signed(unpack(words[channels], bits, features, _AWQ_ORDER), bits).T
        return signed(unpack(words.T[features] if layout.startswith("gptq") else words[features], bits, channels), bits)

    def scales(self, features: slice) -> np.ndarray:
        """f32 [features, groups]."""
        if "scales" in self.parts:
            return self.reader.view(self.parts["scales"]).T[features].astype(np.float32)
        return self.reader.view(self.parts["weight_scale"])[features].astype(np.float32)

    def zeros(self, features: slice) -> np.ndarray:
        """f32 [features, groups], in steps of the codes.

        Raises:
          CheckpointError: they are not 0 although the config says that codes are symmetric.
        """
        bits, layout = self.coding.bits, self.scheme.layout
        if layout.endswith("quantized"):
            if not self.coding.shifted:
                return np.zeros((features.stop - features.start, self.groups), np.float32)
            table = self.reader.raw(self.parts["weight_zero_point"])
            if table.dtype == np.int8:
                return table[features].astype(np.float32)
            return signed(unpack(table.T, bits, features), bits).T.astype(np.float32)
        table = self.reader.raw(self.parts["qzeros"])
        numbers = unpack(table, bits, features, _AWQ_ORDER if layout == "awq" else None).T.astype(np.float32)
        # GPTQ's first format keeps zeros less one. One is added to the number, not to the word, which it could leave.
        zeros = numbers - 2 ** (bits - 1) + (layout == "gptq")
        if not self.coding.shifted and zeros.any():
            raise self._error("its qzeros are not those of symmetric codes, which the config says it has (sym)")
        return zeros

    def floats(self) -> np.ndarray:
        """f32 [features, channels]."""
        everything = slice(0, self.shape[0])
        weights = self.codes(everything, slice(0, self.shape[1])).astype(np.float32)
        scales, zeros = self.scales(everything), self.zeros(everything)
        weights -= zeros[:, self.group_of]
        weights *= scales[:, self.group_of]
        return weights

    def _check_tables(self) -> None:
        features, words = self.shape[0], -(-self.shape[0] * self.coding.bits // 32)
        expected: dict[str, Any] = {
            "scales": (self.groups, features),
            "qzeros": (self.groups, words),
            "weight_scale": (features, self.groups),
        }
        for part, shape in expected.items():
            if part in self.parts and self._shape(part) != shape:
                raise self._error(f"its {part} has the shape {list(self._shape(part))}, expected {list(shape)}")
        kinds: dict[str, tuple[str, ...]] = {"scales": FLOATS, "weight_scale": FLOATS, "weight": ("I8",)}
        kinds |= dict.fromkeys(("qweight", "qzeros", "weight_packed"), ("I32",))
        if "weight_zero_point" in self.parts:
            whole = self.reader.tensors[self.parts["weight_zero_point"]].dtype == "I8"
            shape = (features, self.groups) if whole else (words, self.groups)
            if self._shape("weight_zero_point") != shape:
                raise self._error(f"its weight_zero_point has not the shape {list(shape)}")
            kinds["weight_zero_point"] = ("I8", "I32")
        for part, allowed in kinds.items():
            if part in self.parts and self.reader.tensors[self.parts[part]].dtype not in allowed:
                raise self._error(f"its {part} is {self.reader.tensors[self.parts[part]].dtype}, not {allowed[0]}")

    def _shape(self, part: str) -> tuple[int, ...]:
        shape = self.reader.tensors[self.parts[part]].shape
        if len(shape) != 2:
            raise self._error(f"its {part} has {len(shape)} axes, not 2")
        return shape

    def _read(self, part: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        info = self.reader.tensors[self.parts[part]]
        if (info.dtype, info.shape) != (dtype, shape):
            raise self._error(f"its {part} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}")
        return self.reader.raw(self.parts[part])

    def _error(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"the packed weight {self.name[:200]!r} in {self.reader.folder} cannot be read as {self.scheme.layout}: "
            f"{why}"
        )


Tensors = SafetensorsFolder | PackedFolder


def open_weights(folder: Folder, scheme: Scheme | None) -> Tensors:
    """The tensors of a folder, packed weights as floats; see both classes for what is raised."""
    reader = SafetensorsFolder(folder)
    return reader if scheme is None else PackedFolder(reader, scheme)
