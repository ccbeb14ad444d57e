"""Weights of projections to codes and scales, part by part, as they are read."""

from collections.abc import Iterable, Iterator

import numpy as np

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.models.io.packed.folder import PackedWeight, Tensors

_BLOCK = 1 << 20  # weights that are floats at a time


class Coder:
    """Codes and scales of weights: the checkpoint's own, where they are coded so, or made of floats.

    The step of a group is what its largest weight needs, 2 * max|w| / (2**bits - 1), as compressed-tensors and GPTQ
    have it where codes are symmetric; with zeros (max - min) / (2**bits - 1). It counts all channels of a group,
    whatever part of them a device holds, so codes are the same on every mesh.
    """

    def __init__(self, tensors: Tensors, coding: WeightCoding, exact: bool = False) -> None:
        """`exact`: of weights that are coded otherwise, or not at all, `check` raises CheckpointError."""
        self.tensors, self.coding, self.exact = tensors, coding, exact
        self._found: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def read(self, kind: str, name: str, rows: slice, features: slice) -> np.ndarray:
        """A part of "codes" i8 [channels, features], "scales" or "zeros" f32 [groups, features] of a weight."""
        packed = self._packed(name)
        if packed is not None:
            if kind == "codes":
                return packed.codes(features, rows).T
            return (packed.scales if kind == "scales" else packed.zeros)(features)[:, rows].T
        if kind == "codes":
            return self._codes(name, rows, features).T
        return self._tables(name, features)[0 if kind == "scales" else 1][:, rows].T

    def check(self, names: Iterable[str]) -> None:
        """Raises CheckpointError, naming the tensor, if one of these weights has no codes to take and must have."""
        for name in names:
            packed = self._packed(name)
            if packed is not None and not self.coding.shifted:
                packed.zeros(slice(0, packed.shape[0]))  # are none, or this raises
            if self.exact and packed is None:
                why = "its groups are not consecutive channels" if self.tensors.packed(name) else "it is not packed"
                raise CheckpointError(
                    f"{name!r} in {self.tensors.folder} cannot be taken as the others' {self.coding}: {why}. Load with "
                    'weights="int8" or "int4", which codes all anew, or with weights="float"'
                )

    def _packed(self, name: str) -> PackedWeight | None:
        packed = self.tensors.packed(name)
        return packed if packed is not None and packed.ordered and packed.coding == self.coding else None

    def _tables(self, name: str, features: slice) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros, f32 [features, groups]."""
        key = name, features.start, features.stop
        if key not in self._found:
            weights = self.tensors.view(name)[features]
            groups, bits = self.coding.groups(weights.shape[1]), self.coding.bits
            scales, zeros = (np.zeros((len(weights), groups), np.float32) for _ in range(2))
            for here, part in _blocks(weights):
                parted = part.reshape(len(part), groups, -1)
                low, high = np.minimum(parted.min(axis=-1), 0), np.maximum(parted.max(axis=-1), 0)
                if not self.coding.shifted:
                    high = np.maximum(high, -low)
                    low = -high
                with np.errstate(invalid="ignore"):  # of weights that are not finite
                    scales[here] = step = (high - low) * np.float32(1 / (2**bits - 1))
                    if self.coding.shifted:
                        np.divide(-low, step, out=zeros[here], where=step > 0)
                        zeros[here] = np.rint(zeros[here]) - 2 ** (bits - 1)
            self._found[key] = scales, zeros
        return self._found[key]

    def _codes(self, name: str, channels: slice, features: slice) -> np.ndarray:
        """i8 [features, channels]."""
        weights, (scales, zeros) = self.tensors.view(name)[features], self._tables(name, features)
        size = weights.shape[1] // scales.shape[1]
        first, last = channels.start // size, -(-channels.stop // size)  # the groups that hold these channels
        cut = slice(channels.start - first * size, channels.stop - first * size)
        scales, zeros = (table[:, first:last, None] for table in (scales, zeros))
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        end = 2 ** (self.coding.bits - 1)
        codes = np.empty((len(weights), channels.stop - channels.start), np.int8)
        for here, part in _blocks(weights[:, first * size : last * size]):
            parted = part.reshape(len(part), last - first, size)
            with np.errstate(invalid="ignore"):
                parted *= inverse[here]
                parted += zeros[here]
                np.clip(np.rint(parted, out=parted), -end, end - 1, out=parted)
            np.nan_to_num(parted, copy=False)
            codes[here] = part[:, cut]
        return codes


def _blocks(weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of a matrix as float32, copies."""
    step = max(_BLOCK // max(weights.shape[1], 1), 1)
    for start in range(0, len(weights), step):
        here = slice(start, min(start + step, len(weights)))
        yield here, np.array(weights[here], np.float32)
