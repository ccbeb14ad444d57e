"""InternViT (https://arxiv.org/abs/2312.14238), the small one: layers whose branches have learned sizes."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.encoder import PatchEmbedding, check_images, encoder


class InternVisionTower(nn.Module):
    """InternVL's image encoder, without a norm behind the last layer.

    Parameters are float32 unless loaded otherwise, and stacked over layers:

        patch_embedding/{kernel [patch, patch, 3, D], bias [D]}, class_embedding [1, 1, D],
        position_embedding [1, patches + 1, D], layers/... as in `ClipVisionTower`, and layers/{scale_1, scale_2} [L, D]

    Attributes:
      config: The tower's sizes, with `layer_scale`.
      dtype: Of the computation and of the result. Norm statistics and softmax are float32 whatever it is.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The last hidden state of normalised images.

        Args:
          pixels: f32 [images, image_size, image_size, 3].

        Returns:
          [images, 1 + patches, hidden_size] in `dtype`; the class token is first.

        Raises:
          InputError: if the image size does not fit the tower.
        """
        config = self.config
        last = (config.num_layers,)
        check_images(config, pixels.shape[1], pixels.shape[2], last, None)
        normal, channels = nn.initializers.normal(0.02), config.hidden_size
        class_token = self.param("class_embedding", normal, (1, 1, channels), jnp.float32).astype(self.dtype)
        shape = (1, config.grid_size**2 + 1, channels)
        table = self.param("position_embedding", normal, shape, jnp.float32).astype(self.dtype)
        patches = PatchEmbedding(config, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        first = jnp.broadcast_to(class_token, (len(patches), 1, channels))
        return encoder(config, self.dtype, jnp.concatenate([first, patches], axis=1) + table, last)
