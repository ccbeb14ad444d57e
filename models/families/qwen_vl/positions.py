"""Positions of a prompt with images on three axes: time, height and width (M-RoPE)."""

import jax
import jax.numpy as jnp


def axes_positions(
    lengths: jax.Array, visual: jax.Array, frames: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rotary positions of all tokens, and of the one behind the last.

    A text token is at the same position on all axes, one behind the largest before it. The tokens of an image or video
    begin there, too, and count time, rows and columns from there on:

        tokens   a b [ 2 x 3 image ] c          time    0 1 2 2 2 2 2 2 5
                                                height  0 1 2 2 2 3 3 3 5
                                                width   0 1 2 3 4 2 3 4 5

    Args:
      lengths: i32 [batch].
      visual: bool [batch, length].
      frames: i32 [batch, length], number of each visual token's frame, as in `Batch.cells`. Anything elsewhere.
      places: i32 [batch, 3, length]: time, row and column of each visual token in its image or video, of which the last
        one is the largest on every axis. Anything elsewhere.

    Returns:
      (i32 [batch, 3, length], those of padding that of the row's last token at most; i32 [batch]).
    """
    length = visual.shape[1]
    true = jax.lax.iota(jnp.int32, length)[None] < lengths[:, None]
    visual = visual & true
    steps = frames[:, 1:] - frames[:, :-1]
    same = visual[:, 1:] & (steps >= 0) & (steps <= 1)  # between images a number is left out
    goes_on = jnp.pad(same, ((0, 0), (0, 1)))  # the next token is of the same image
    # What the next token's position grows by: nothing within an image, its largest extent at its end.
    step = jnp.where(visual, jnp.where(goes_on, 0, places.max(axis=1) + 1), true.astype(jnp.int32))
    end = jnp.cumsum(step, axis=1, dtype=jnp.int32)
    inside = jnp.where(visual[:, None], places, 0)
    positions = (end - step)[:, None] + inside
    return jnp.minimum(positions, end[:, None, -1:] - 1), end[:, -1]
