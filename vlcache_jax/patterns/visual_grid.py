"""How far apart, in a prompt, the rows of an image lie, and its frames: what the model itself knows of its prompt."""

import jax
import jax.numpy as jnp

from vlcache_jax.pruning.stage import Stage


def visual_strides(stage: Stage) -> jax.Array | None:
    """i32 [batch, 2]: tokens from one row of an image to the next, and from one frame, tile or image to the next.

    Of each prompt's first image, whatever stands between rows (a token that ends one, say) included; 0 where there is
    no next one. None for models that do not tell where their visual tokens lie.
    """
    if stage.grid is None:
        return None
    index = jax.lax.iota(jnp.int32, stage.room)[None]
    placed = (stage.grid[:, 0] >= 0) & stage.valid
    first = jnp.argmax(placed, axis=1)[:, None]
    row, column = stage.grid[:, 1], stage.grid[:, 2]
    row_of, column_of = (jnp.take_along_axis(x, first, axis=1) for x in (row, column))

    def until(found: jax.Array) -> jax.Array:
        found = found & placed & (index > first)
        return jnp.where(jnp.any(found, axis=1), jnp.argmax(found, axis=1).astype(jnp.int32) - first[:, 0], 0)

    below = until((column == column_of) & (row != row_of))
    return jnp.stack([below, until((column == column_of) & (row == row_of))], axis=1)
