"""Gemma 3's projector: patches are averaged, normalised and multiplied into the decoder's space."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.decoder.decoder import RMSNorm


class Projector(nn.Module):
    """Average over squares of patches, RMS norm, one matrix (arXiv 2503.19786, section 2.1).

    Parameters: norm/scale [vision channels], kernel [vision channels, D].

    Attributes:
      hidden_size: D, the decoder's hidden size.
      grid: visual tokens along one side of an image.
      epsilon: of the norm.
      dtype: Of the computation and of the result. Averages and the norm are float32 whatever it is.
    """

    hidden_size: int
    grid: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[images, patches, vision channels] -> [images, grid * grid, D], row by row."""
        images, patches, channels = features.shape
        pool = int(patches**0.5) // self.grid
        squares = features.reshape(images, self.grid, pool, self.grid, pool, channels)
        averages = jnp.mean(squares, axis=(2, 4), dtype=jnp.float32).astype(self.dtype)
        normed = RMSNorm(self.epsilon, self.dtype, one_plus=True, name="norm")(averages.reshape(images, -1, channels))
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (channels, self.hidden_size), jnp.float32)
        return normed @ kernel.astype(self.dtype)
