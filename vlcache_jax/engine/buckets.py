"""The few sizes that prompts are padded to."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.text.buckets import bucket_length

_SLACK = 1.1
_PADDING = {"vision_index": TEXT, "cells": -1}


class Bucket(NamedTuple):
    """A size of prompts.

    Attributes:
      tokens: visual ones included.
      tiles: of all images of a prompt, or patches of a model that takes images of any size: `Batch.pixels.shape[1]`.
      frames: of each patch, more than one in prompts with a video of a model that takes frames together. Such prompts
        have buckets of their own, so that no image is computed otherwise because of what runs beside it.
    """

    tokens: int
    tiles: int
    frames: int = 1

    @classmethod
    def of(cls, batch: Batch, model: Any) -> "Bucket":
        """The size of a batch's rows as they are."""
        tiles, channels = batch.pixels.shape[1], batch.pixels.shape[-1]
        still = model.abstract_batch(1, 1, 1).pixels.shape[-1]
        return cls(int(np.max(batch.lengths)), tiles, max(1, channels // still) if tiles else 1)

    @property
    def given(self) -> tuple[int, ...]:
        """As a user gives it."""
        return self[:2] if self.frames == 1 else tuple(self)

    def holds(self, other: "Bucket") -> bool:
        """Whether a prompt of another size fits."""
        alike = other.frames == self.frames or not other.tiles
        return alike and other.tokens <= self.tokens and other.tiles <= self.tiles

    def shapes(self, model: Any, rows: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s of so many prompts of this size."""
        batch = model.abstract_batch(rows, self.tokens, self.tiles)
        if self.frames == 1:
            return batch
        pixels = batch.pixels
        moving = jax.ShapeDtypeStruct((*pixels.shape[:-1], pixels.shape[-1] * self.frames), pixels.dtype)
        return dataclasses.replace(batch, pixels=moving)


def padding(shapes: Batch) -> Batch:
    """A batch of nothing but padding, of shapes from `FamilyModel.abstract_batch`. It is never read."""
    fields = {field.name: getattr(shapes, field.name) for field in dataclasses.fields(shapes)}
    return Batch(**{name: x and np.full(x.shape, _PADDING.get(name, 0), x.dtype) for name, x in fields.items()})


def pad(batch: Batch, shapes: Batch) -> Batch:
    """A batch that fits into these shapes, padded to them."""
    found, made = np.shape(batch.pixels)[2:], shapes.pixels.shape[2:]
    if batch.pixels.shape[1] and found != made:
        raise InputError(
            f"tiles or patches of {list(found)}, where the engine's programs have {list(made)}: prepare the prompt by "
            "the model's own processor"
        )
    new = padding(shapes)
    for field in dataclasses.fields(new):
        to, found = getattr(new, field.name), getattr(batch, field.name)
        if to is not None and found is not None:  # the cells of a prompt without images are None
            part = np.asarray(found)[tuple(slice(size) for size in to.shape)]
            to[tuple(slice(size) for size in part.shape)] = part
    return new


def check_buckets(buckets: Any) -> tuple[Bucket, ...]:
    """The user's (tokens, tiles) or (tokens, tiles, frames), the smallest first. Raises InputError for others."""
    try:
        found = sorted({Bucket(*(int(x) for x in pair)) for pair in buckets})
    except (TypeError, ValueError):
        found = []
    if not found or any(bucket.tokens < 1 or bucket.tiles < 0 or bucket.frames < 1 for bucket in found):
        raise InputError(f"buckets={buckets!r}: give pairs (tokens, tiles), such as [(1024, 1), (2048, 3)]")
    return tuple(found)


def smallest(buckets: Sequence[Bucket], size: Bucket) -> Bucket:
    """The first bucket that holds a size. Raises InputError if there is none."""
    for bucket in buckets:
        if bucket.holds(size):
            return bucket
    frames = f" of {size.frames} frames each" if size.frames > 1 else ""
    raise InputError(
        f"a prompt of {size.tokens} tokens and {size.tiles} tiles of images{frames} is larger than all of the engine's "
        f"buckets {[bucket.given for bucket in buckets]}: shorten it, or give the engine a larger one"
    )


def sixty_fours(tokens: int) -> int:
    """The next multiple of 64: lengths of prompts that are all known."""
    return -(-tokens // 64) * 64


def fit(sizes: Iterable[Bucket], most: int, padded: Callable[[int], int] = bucket_length) -> tuple[Bucket, ...]:
    """A few buckets that hold all sizes with little padding.

    Sizes are rounded up, by default to the processor's padded lengths, then sorted by their tokens and cut into at most
    `most` runs, each of which is a bucket; fewer, each of which saves compiling, if that pads them by a tenth more at
    most. Prompts with videos, of models that take frames together, share these with none but those without any image.

    Example:
      >>> fit([Bucket(100, 1), Bucket(120, 1), Bucket(700, 2)], most=2)
      (Bucket(tokens=128, tiles=1, frames=1), Bucket(tokens=768, tiles=2, frames=1))
      >>> fit([Bucket(700, 2)], most=2, padded=sixty_fours)
      (Bucket(tokens=704, tiles=2, frames=1),)
    """
    sizes = [size._replace(tokens=padded(size.tokens)) for size in sizes]
    kinds = sorted({size.frames for size in sizes if size.tiles}) or [1]
    found: list[Bucket] = []
    for frames in kinds:
        alike = [size for size in sizes if size.frames == frames or not (size.tiles or 1 in kinds)]
        found += [bucket._replace(frames=frames) for bucket in _fit_alike(alike, max(1, most // len(kinds)))]
    return tuple(sorted(found))


def _fit_alike(sizes: Sequence[Bucket], most: int) -> list[Bucket]:
    """`fit`, of sizes that differ in tokens and tiles alone."""
    counts: dict[int, tuple[int, int]] = {}
    for length, own, _ in sizes:
        count, before = counts.get(length, (0, 0))
        counts[length] = (count + 1, max(own, before))
    lengths = sorted(counts)
    number, tiles = ([counts[length][i] for length in lengths] for i in (0, 1))
    below = [0, *accumulate(number)]  # prompts of the first j lengths
    # cost[j]: padded tokens of the first j lengths with the buckets used so far; cut[k][j]: where the last run begins
    cost = [0.0] + [float("inf")] * len(lengths)
    cuts, totals = [], []
    for _ in range(min(most, len(lengths))):
        options = [
            [(cost[i] + lengths[j - 1] * (below[j] - below[i]), i) for i in range(j)]
            for j in range(1, len(lengths) + 1)
        ]
        best = [min(row) for row in options]
        cuts.append([0] + [i for _, i in best])
        cost = [0.0] + [value for value, _ in best]
        totals.append(cost[-1])
    enough = next(i for i, total in enumerate(totals, 1) if total <= _SLACK * totals[-1])
    found, end = [], len(lengths)
    for cut in reversed(cuts[:enough]):
        if end:
            found.append(Bucket(lengths[end - 1], max(tiles[cut[end] : end])))
            end = cut[end]
    return found
