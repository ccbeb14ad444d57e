"""Tokens and images of prompts to a batch, and how large they are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.text.buckets import bucket_length


@dataclasses.dataclass(frozen=True)
class PromptSize:
    """How large a prompt is.

    Attributes:
      tokens: of the whole prompt.
      images: visual tokens of each image or video.
      tiles: of all of them, or patches.
      bucket: what tokens and tiles are padded to if nothing else is said, in a batch of its own.
    """

    tokens: int
    images: tuple[int, ...]
    tiles: int
    bucket: tuple[int, int]

    @classmethod
    def of(cls, tokens: np.ndarray, images: Sequence[EncodedImage], buckets: Sequence[int] | None) -> "PromptSize":
        """That of a prompt with these tokens and images."""
        tiles = sum(len(image.pixels) for image in images)
        bucket = bucket_length(len(tokens), buckets), tile_bucket([images], tiles)
        return cls(len(tokens), tuple(len(image.index) for image in images), tiles, bucket)


def tile_bucket(rows: Sequence[Sequence[EncodedImage]], most: int) -> int:
    """How many tiles or patches rows are padded to, of which one has `most`."""
    patches = any(image.cells is not None for images in rows for image in images)
    return bucket_length(most) if patches else most


def assembled(
    tokens: list[np.ndarray],
    encoded: list[list[EncodedImage]],
    pixels: np.ndarray,
    length: int,
    visual_ids: Sequence[int],
    padding_id: int,
    blends: bool,
) -> Batch:
    """A batch.

    Args:
      tokens: i32 ids of each prompt, visual ones included.
      encoded: the images and videos of each prompt.
      pixels: `Batch.pixels` of them.
      length: what prompts are padded to.
      visual_ids: of the tokens that stand for features.
      padding_id: fills the rows.
      blends: as of `BlendingLayout`.
    """
    token_rows = np.full((len(tokens), length), padding_id, np.int32)
    vision_index = np.full((len(tokens), length), TEXT, np.int32)
    for row, ids in enumerate(tokens):
        token_rows[row, : len(ids)] = ids
        indices, offset = [np.zeros(0, np.int32)], 0
        for image in encoded[row]:
            indices.append(np.where(image.index >= 0, image.index + offset, image.index))
            offset += image.features
        # A slice keeps the padding out: a checkpoint's padding token could be its image token.
        vision_index[row, : len(ids)][np.isin(ids, visual_ids)] = np.concatenate(indices)
    lengths = np.asarray([len(ids) for ids in tokens], np.int32)
    blend = _blend(vision_index, encoded) if blends and pixels.shape[1] else (None, None)
    return Batch(token_rows, lengths, vision_index, pixels, _cells(encoded, pixels), *blend)


def _cells(encoded: list[list[EncodedImage]], pixels: np.ndarray) -> np.ndarray | None:
    """`Batch.cells` of the images of all prompts, also where no prompt has any; None where pixels are of tiles."""
    if pixels.ndim != 3 or not pixels.shape[1]:
        return None
    found = np.full((*pixels.shape[:2], 4), -1, np.int32)
    for row, images in enumerate(encoded):
        start = frames = 0
        for image in images:
            assert image.cells is not None
            end = start + len(image.cells)
            found[row, start:end] = image.cells + np.array([frames, 0, 0, 0], np.int32)
            start, frames = end, int(found[row, end - 1, 0]) + 2  # one is left out between images
    return found


def _blend(vision_index: np.ndarray, encoded: list[list[EncodedImage]]) -> tuple[np.ndarray, np.ndarray]:
    """`Batch.blend_index` and `Batch.blend_weights` of the images of all prompts, also where no prompt has any."""
    index, weights = (np.zeros((*vision_index.shape, 4), dtype) for dtype in (np.int32, np.float32))
    for row, images in enumerate(encoded):
        places, at, offset = np.flatnonzero(vision_index[row] != TEXT), 0, 0
        for image in images:
            here = places[at : at + len(image.index)]
            if image.blend is not None:
                index[row, here], weights[row, here] = image.blend[0] + offset, image.blend[1]
            at, offset = at + len(image.index), offset + image.features
    return index, weights
