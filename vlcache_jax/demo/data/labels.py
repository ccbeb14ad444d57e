"""What every patch of an image shows: the targets of the vision tower's auxiliary loss."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlcache_jax.demo.data.words import COLOURS, ITEMS, NAMES, SHAPES

DIGIT_SLOTS = 4
CELL = 4
"""Patches along a side of the coarse cells that say where something is."""

WORDS = (*NAMES, *ITEMS)
CLASSES = {
    "word": 1 + 2 * len(WORDS),  # 0 none; 1 + 2 * word + half
    "owner": 1 + len(WORDS),  # of a value: whose it is
    "digits": 11,  # 0 none; 1 + digit
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
}


@dataclasses.dataclass(frozen=True)
class PatchLabels:
    """Class indices of patches, 0 for "none". Leading axes [...] are patches, or images and patches.

    Attributes:
      word: u8 [...]. The half of a field's name printed here.
      owner: u8 [...]. The name of the field whose value is printed here.
      digits: u8 [..., 4]. The digits of that value.
      colour: u8 [...]. Of the shape drawn here.
      shape: u8 [...]. Of the shape drawn here.
    """

    word: np.ndarray
    owner: np.ndarray
    digits: np.ndarray
    colour: np.ndarray
    shape: np.ndarray

    @classmethod
    def empty(cls, patches: int) -> "PatchLabels":
        """Labels of blank patches."""
        blank = [np.zeros(patches, np.uint8) for _ in range(4)]
        return cls(blank[0], blank[1], np.zeros((patches, DIGIT_SLOTS), np.uint8), blank[2], blank[3])

    @classmethod
    def stack(cls, labels: "Sequence[PatchLabels]") -> "PatchLabels":
        """Stacks each array along a new first axis."""
        return cls(**{f.name: np.stack([getattr(x, f.name) for x in labels]) for f in dataclasses.fields(cls)})
