"""Fewer features with more channels each."""

import jax


def pixel_shuffle(features: jax.Array, factor: int) -> jax.Array:
    """Squares of `factor` x `factor` features become one: the channels of its rows, one after another.

    Args:
      features: [images, side * side, channels], row by row; `factor` divides the side.
      factor: features along one side of what becomes one.

    Returns:
      [images, (side / factor)², factor² * channels], row by row.
    """
    images, count, channels = features.shape
    side = int(count**0.5) // factor
    squares = features.reshape(images, side, factor, side, factor, channels).swapaxes(2, 3)
    return squares.reshape(images, side * side, factor * factor * channels)
