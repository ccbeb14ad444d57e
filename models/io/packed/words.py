"""Small whole numbers in the 32-bit words of a tensor."""

from collections.abc import Sequence

import numpy as np


def unpack(words: np.ndarray, bits: int, part: slice, order: Sequence[int] | None = None) -> np.ndarray:
    """Numbers that words hold along their last axis, lowest bits first.

    Args:
      words: i32 [..., n].
      bits: of a number; 4 or 8.
      part: which of the 32 / bits * n numbers along the axis.
      order: from which place of its word each number comes, where they do not lie in order.

    Returns:
      u8 [..., numbers].
    """
    count = 32 // bits
    places = np.arange(count) if order is None else np.asarray(order)
    first, last = part.start // count, -(-part.stop // count)
    words = np.ascontiguousarray(words[..., first:last]).view(np.uint32)
    numbers = np.empty((*words.shape, count), np.uint8)
    for index, place in enumerate(places):
        numbers[..., index] = (words >> np.uint32(place * bits)) & np.uint32(2**bits - 1)
    numbers = numbers.reshape(*words.shape[:-1], -1)
    return numbers[..., part.start - first * count : part.stop - first * count]


def signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """i8: numbers from 0 to 2**bits - 1 as ones from -(2 ** (bits - 1)) on, each smaller by as much."""
    return (numbers.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
