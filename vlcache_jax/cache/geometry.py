"""Where segments may start and how many slots a pool has."""

from collections.abc import Sequence

import jax

from vlcache_jax.kernels.precision import PRECISIONS

ALIGNMENT = 16
"""Segments of a float store start at multiples of this many slots."""


def segment_alignment(bits: int | str | None) -> int:
    """Segments start at multiples of this many slots: `ALIGNMENT`, or a group of a store of codes.

    Example:
      >>> [segment_alignment(bits) for bits in (None, 8, 4, 2)]
      [16, 32, 64, 128]
    """
    return ALIGNMENT if bits is None else max(ALIGNMENT, PRECISIONS[bits].group)


def align(count: jax.Array | int, alignment: int = ALIGNMENT) -> jax.Array | int:
    """Rounds up to a multiple of `alignment`."""
    return (count + alignment - 1) // alignment * alignment


def whole_tiles(slots: int) -> int:
    """Rounds the slots of a large store up to a multiple of 128.

    The TPU kernel needs it for head sizes below 128, whose tiles have the slots as their last axis. Small stores, where
    it would cost more than a sixteenth, are left alone; there the kernel's place is taken by plain XLA.
    """
    return -(-slots // 128) * 128 if slots >= 2048 else slots


def regular_slots(layers: int, room: int) -> int:
    """Pool size of a store with `room` slots for each of its layers."""
    return whole_tiles(layers * room)


def window_rooms(windows: Sequence[int | None], length: int, alignment: int = ALIGNMENT) -> tuple[int, ...]:
    """Slots of each layer in a store of prompts of `length` tokens: its window (`ModelSpec.windows`), or all of them.

    Example:
      >>> window_rooms((20, None, 1024), length=100)
      (32, 112, 112)
    """
    return tuple(int(align(length if window is None else min(window, length), alignment)) for window in windows)


def capacity(slots: int, layers: int, alignment: int = ALIGNMENT) -> int:
    """Pool size that holds `layers` aligned segments of `slots` slots in all, however they are shared out.

    Example:
      >>> capacity(100, layers=4)
      160
    """
    return whole_tiles(int(align(slots + layers * (alignment - 1), alignment)))


def answer_room(tokens: int) -> int:
    """Slots for generated tokens: one of a few sizes, so that another number of tokens compiles nothing new.

    Powers of two from 16 to 256, then multiples of 256, which waste less.

    Example:
      >>> [answer_room(tokens) for tokens in (1, 17, 64, 200, 300)]
      [16, 32, 64, 256, 512]
    """
    tokens = max(ALIGNMENT, int(tokens))
    return 1 << (tokens - 1).bit_length() if tokens <= 256 else int(align(tokens, 256))
