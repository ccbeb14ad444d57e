"""The CLIP vision tower (https://arxiv.org/abs/2103.00020): a pre-norm ViT that LLaVA takes features of."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.encoder import PatchEmbedding, check_images, encoder, layer_norm


class ClipVisionTower(nn.Module):
    """CLIP's image encoder up to the hidden states, without the final norm and projection.

    Parameters are float32 unless loaded otherwise, and stacked over layers:

        patch_embedding/kernel [patch, patch, 3, D], class_embedding [D], position_embedding [patches + 1, D],
        pre_norm/{scale, bias} [D], layers/{norm_1, norm_2}/{scale, bias} [L, D],
        layers/attention/{query, key, value, output}/{kernel [L, D, D], bias [L, D]},
        layers/mlp/{fc1, fc2}/{kernel, bias}

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
        feature_layers: tuple[int, ...],
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of normalised images.

        Args:
          pixels: f32 [images, height, width, 3]. Both sides `config.image_size`, or with
            `position_ids` any multiples of `config.patch_size`.
          feature_layers: Which hidden states to return: 0 is the normed embedding, i the output of layer i
            (at most `config.num_layers`). Several are concatenated along the channels in this order.
          position_ids: i32 [patches] in [0, grid_size²), optional. The row of the patch position table each
            patch takes, row-major, the class token not counted. Lets a sub-grid of an image be encoded.

        Returns:
          [images, 1 + patches, hidden_size * len(feature_layers)] in `dtype`; the class token is first.

        Raises:
          InputError: if the image size, `position_ids` or `feature_layers` does not fit the tower.
        """
        config = self.config
        images, height, width, _ = pixels.shape
        check_images(config, height, width, feature_layers, position_ids)
        channels = config.hidden_size
        normal = nn.initializers.normal(0.02)
        class_D = self.param("class_embedding", normal, (channels,), jnp.float32)
        table = self.param("position_embedding", normal, (config.grid_size**2 + 1, channels), jnp.float32).astype(
            self.dtype
        )
        if position_ids is not None:
            table = jnp.concatenate([table[:1], table[1 + jnp.asarray(position_ids)]])

        patches = PatchEmbedding(config, self.dtype, name="patch_embedding")(pixels)
        class_ = jnp.broadcast_to(class_D.astype(self.dtype), (images, 1, channels))
        x = jnp.concatenate([class_, patches], axis=1) + table[None]
        x = layer_norm(x, config.layer_norm_eps, self.dtype, "pre_norm")

        return encoder(config, self.dtype, x, feature_layers)
