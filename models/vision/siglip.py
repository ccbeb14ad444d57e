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
        layers/... as in `ClipVisionTower`, post_norm/{scale, bias} [D] if the last state is taken

    Attributes:
      config: The tower's sizes.
      dtype: Of the computation and of the result. Norm statistics and softmax are float32 whatever it is.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        pixels: jax.Array,
        feature_layers: tuple[int, ...] | None = None,
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of normalised images.

        Args:
          pixels: f32 [images, height, width, 3]. Both sides `config.image_size`, or with `position_ids` any multiples
            of `config.patch_size`.
          feature_layers: Which hidden states to return, as the layers leave them; see `ClipVisionTower`. None: the
            last one, after the final norm.
          position_ids: i32 [patches] in [0, grid_size²), optional. The row of the position table that each patch takes,
            row-major. Lets a sub-grid of an image be encoded.

        Returns:
          [images, patches, hidden_size] in `dtype`, row by row; several feature layers are side by side.

        Raises:
          InputError: if the image size, `position_ids` or `feature_layers` does not fit the tower.
        """
        config = self.config
        wanted = (config.num_layers,) if feature_layers is None else feature_layers
        check_images(config, pixels.shape[1], pixels.shape[2], wanted, position_ids)
        shape = (config.grid_size**2, config.hidden_size)
        table = self.param("position_embedding", nn.initializers.normal(0.02), shape, jnp.float32).astype(self.dtype)
        if position_ids is not None:
            table = table[jnp.asarray(position_ids)]
        patches = PatchEmbedding(config, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        x = encoder(config, self.dtype, patches + table[None], wanted)
        return layer_norm(x, config.layer_norm_eps, self.dtype, "post_norm") if feature_layers is None else x
