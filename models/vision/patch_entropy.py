"""How much is in a patch of an image: the entropy of its grey levels."""

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.models.images.transform import CLIP_MEAN, CLIP_STD

_GREY = (0.299, 0.587, 0.114)
_HALF = (0.5, 0.5, 0.5)
_AT_ONCE = 64  # patches


def patch_entropy(pixels: jax.Array, patch: int, clip: bool) -> jax.Array:
    """Shannon entropy in bits of the histogram over 256 grey levels, of each patch.

    With n pixels, c_i of which have the level of pixel i, that is the mean over pixels of log2(n / c_i).

    Args:
      pixels: f32 [tiles, height, width, 3], normalised as CLIP's own processor does, or else SigLIP's.
      patch: pixels along its side; what is left of a tile is cut off.
      clip: see `pixels`.

    Returns:
      f32 [tiles, patches], row by row.
    """
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (_HALF, _HALF)
    weights = 255 * np.asarray(std) * np.asarray(_GREY)
    offset = 255 * float(np.dot(mean, _GREY))
    grey = jnp.einsum("nhwc,c->nhw", pixels, jnp.asarray(weights, pixels.dtype), precision="highest") + offset
    level = jnp.clip(jnp.round(grey), 0, 255).astype(jnp.int32)
    tiles, rows, columns = len(level), pixels.shape[1] // patch, pixels.shape[2] // patch
    level = level[:, : rows * patch, : columns * patch].reshape(tiles, rows, patch, columns, patch)
    level = level.swapaxes(2, 3).reshape(tiles * rows * columns, patch**2)

    def entropy(level: jax.Array) -> jax.Array:
        same = jnp.sum(level[:, None] == level[None], axis=1, dtype=jnp.float32)
        return jnp.mean(jnp.log2(len(level) / same))

    return jax.lax.map(entropy, level, batch_size=_AT_ONCE).reshape(tiles, rows * columns)
