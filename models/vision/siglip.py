"""The SigLIP vision tower (https://arxiv.org/abs/2303.15343): CLIP's layers, patches with a bias, no class token."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.encoder import PatchEmbedding, check_images, encoder, layer_norm


class SiglipVisionTower(nn.Module):
    """SigLIP's image encoder up to its final norm, without the pooling head.

    Parameters are float32 unless loaded otherwise, and stacked over layers:

        patch_embedding/{kernel [patch, patch, 3, D], bias [D]}, position_embedding [patches, D],
        layers/... as in `ClipVisionTower`, post_norm/{scale, bias} [D] with `final_norm`

    Attributes:
      config: The tower's sizes.
      dtype: Of the computation and of the result. Norm statistics and softmax are float32 whatever it is.
      final_norm: Whether the last hidden state is normed: some models take it as the last layer leaves it.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    final_norm: bool = True

    @nn.compact
    def __call__(self, pixels: jax.Array, position_ids: jax.Array | None = None) -> jax.Array:
        """The last hidden state of normalised images.

        Args:
          pixels: f32 [images, height, width, 3]. Both sides `config.image_size`, or with `position_ids` any multiples
            of `config.patch_size`.
          position_ids: i32 [patches] in [0, grid_size²), optional. The row of the position table that each patch takes,
            row-major. Lets a sub-grid of an image be encoded.

        Returns:
          [images, patches, hidden_size] in `dtype`, row by row.

        Raises:
          InputError: if the image size or `position_ids` does not fit the tower.
        """
        config = self.config
        last = (config.num_layers,)
        check_images(config, pixels.shape[1], pixels.shape[2], last, position_ids)
        shape = (config.grid_size**2, config.hidden_size)
        table = self.param("position_embedding", nn.initializers.normal(0.02), shape, jnp.float32).astype(self.dtype)
        if position_ids is not None:
            table = table[jnp.asarray(position_ids)]
        patches = PatchEmbedding(config, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        x = encoder(config, self.dtype, patches + table[None], last)
        return layer_norm(x, config, self.dtype, "post_norm") if self.final_norm else x
