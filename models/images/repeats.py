"""PixelPrune (arXiv 2604.00886): patches of an image that their neighbours already show are left out, before any model.

Rendered pages and screens have many of them, photographs next to none: no loss is wanted, and none is predicted.
"""

import dataclasses

import numpy as np

from vlcache_jax.models.families.family import EncodedImage


def without_repeats(image: EncodedImage, merge: int, image_token: str, threshold: float = 0.0) -> EncodedImage:
    """A still image without the patches of visual tokens that are as one of their neighbours is.

    A token's patches, `merge` x `merge` of them, are predicted from those of its neighbours A to the left, B above and
    C between them:

        B if C is like A and not like B, else A         in the first row A, in the first column B

    and left out if they are like that, u and v being alike where max |u - v| <= threshold. What was left out counts as
    its prediction from there on, so that no error adds up. The first one stays, and here the last one too, from which
    the size of the image is read: so tokens that stay have the positions, and the patches the places, that they have in
    the whole image.

    Args:
      image: whose `merge`² patches of a token are consecutive.
      merge: patches along one side of a token.
      image_token: the text of a visual token.
      threshold: of colours from 0 to 1.
    """
    assert image.cells is not None
    size = merge**2
    place = image.cells[::size, 2:] // merge
    at = np.zeros(place.max(axis=0) + 1, np.int64)
    at[tuple(place.T)] = np.arange(len(place))
    tokens = image.pixels.reshape(len(place), -1)
    keep = _new(tokens[at].astype(np.int16), int(255 * threshold))
    keep[-1, -1] = True
    stays = keep[tuple(place.T)]
    index = (np.cumsum(stays) - 1)[image.index[stays[image.index]]].astype(np.int32)
    patches = np.repeat(stays, size)
    return dataclasses.replace(
        image,
        pixels=image.pixels[patches],
        cells=image.cells[patches],
        index=index,
        features=len(index),
        text=image_token * len(index),
    )


def _new(x: np.ndarray, limit: int) -> np.ndarray:
    """bool [rows, columns]: which of x [rows, columns, values] are not as predicted."""

    def like(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.abs(u - v).max(axis=-1) <= limit

    keep = np.ones(x.shape[:2], bool)
    if limit == 0:  # then what is left out is its own prediction, and nothing depends on an order
        as_left, as_above = like(x[:, 1:], x[:, :-1]), like(x[1:], x[:-1])
        corner_left, corner_above = as_above[:, :-1], as_left[:-1]
        keep[0, 1:], keep[1:, 0] = ~as_left[0], ~as_above[:, 0]
        keep[1:, 1:] = ~np.where(corner_left & ~corner_above, as_above[:, 1:], as_left[1:])
        return keep
    seen = x.copy()
    for row, column in np.ndindex(*keep.shape):
        if row == column == 0:
            continue
        left, above = seen[row, column - 1], seen[row - 1, column]
        if row == 0 or column == 0:
            guess = left if row == 0 else above
        else:
            corner = seen[row - 1, column - 1]
            guess = above if like(corner, left) and not like(corner, above) else left
        if like(x[row, column], guess):
            keep[row, column], seen[row, column] = False, guess
    return keep
