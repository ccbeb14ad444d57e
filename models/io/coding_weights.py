"""Weights of projections to codes and scales, part by part, as they are read."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from vlcache_jax.models.coding import WeightCoding

_BLOCK = 1 << 20  # weights that are floats at a time


class Tensors(Protocol):
    """Where weights are read from."""

    def view(self, name: str) -> np.ndarray:
        """[features, channels]."""


class Coder:
    """Codes and scales of weights that a checkpoint has as floats.

    The step of a group is what its largest weight needs, 2 * max|w| / (2**bits - 1), as compressed-tensors and GPTQ
    have it where codes are symmetric. It counts all channels of a group whatever part of them a device holds, so codes
    are the same on every mesh.
    """

    def __init__(self, tensors: Tensors, coding: WeightCoding) -> None:
        self.tensors, self.coding = tensors, coding
        self._scales: dict[tuple[str, int, int], np.ndarray] = {}

    def read(self, kind: str, name: str, rows: slice, features: slice) -> np.ndarray:
        """A part of "codes" i8 [channels, features] or "scales" f32 [groups, features] of the weight `name`."""
        return self._codes(name, rows, features).T if kind == "codes" else self._steps(name, features)[:, rows].T

    def _steps(self, name: str, features: slice) -> np.ndarray:
        """f32 [features, groups]."""
        key = name, features.start, features.stop
        if key not in self._scales:
            weights = self.tensors.view(name)[features]
            groups = self.coding.groups(weights.shape[1])
            steps = np.empty((len(weights), groups), np.float32)
            for here, part in _blocks(weights):
                parted = np.abs(part).reshape(len(part), groups, -1)
                steps[here] = parted.max(axis=-1) * np.float32(2 / (2**self.coding.bits - 1))
            self._scales[key] = steps
        return self._scales[key]

    def _codes(self, name: str, channels: slice, features: slice) -> np.ndarray:
        """i8 [features, channels]."""
        steps, weights = self._steps(name, features), self.tensors.view(name)[features]
        size = weights.shape[1] // steps.shape[1]
        first, last = channels.start // size, -(-channels.stop // size)  # the groups that hold these channels
        cut = slice(channels.start - first * size, channels.stop - first * size)
        steps, weights = steps[:, first:last, None], weights[:, first * size : last * size]
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
        end = 2 ** (self.coding.bits - 1)
        codes = np.empty((len(weights), channels.stop - channels.start), np.int8)
        for here, part in _blocks(weights):
            parted = part.reshape(len(part), last - first, size)
            with np.errstate(invalid="ignore"):  # of weights that are not finite, and then the step is not either
                parted *= inverse[here]
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
