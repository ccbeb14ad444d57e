"""How many visual tokens a row of an image has, and an image or frame: what the model itself knows of its prompt."""

import jax
import jax.numpy as jnp

from vlcache_jax.pruning.stage import Stage
from vlcache_jax.typing import ModelSpec


def visual_grid(spec: ModelSpec, stage: Stage) -> jax.Array | None:
    """i32 [batch, 2]: visual tokens of a row, and of an image or frame, of the first image of each prompt.

    Models with positions on three axes tell by them, those of which an image is a square of patches by its side. A row
    of text alone has (0, 0). None for models that tell neither.
    """
    vision = stage.vision_mask & stage.valid
    if stage.positions.ndim == 3:
        index = jax.lax.iota(jnp.int32, stage.room)[None]
        first = jnp.argmax(vision, axis=1)[:, None]  # of a prompt without visual tokens, whatever

        def run_of(*axes: int) -> jax.Array:  # how long the axes stay as they are from the first visual token on
            along = jnp.stack([stage.positions[:, axis] for axis in axes], axis=1)
            start = jnp.take_along_axis(along, jnp.broadcast_to(first[:, None], (*along.shape[:2], 1)), axis=2)
            other = jnp.any(along != start, axis=1) | ~vision
            end = jnp.min(jnp.where(other & (index > first), index, stage.lengths[:, None]), axis=1)
            return jnp.where(jnp.any(vision, axis=1), end - first[:, 0], 0)

        return jnp.stack([run_of(0, 1), run_of(0)], axis=1)
    if not spec.vision_grid:
        return None
    sizes = jnp.asarray([spec.vision_grid, spec.vision_grid**2], jnp.int32)
    return jnp.where(jnp.any(vision, axis=1, keepdims=True), sizes, 0)
