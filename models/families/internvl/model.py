"""InternVL: its own tower, pixel shuffle, a projector and a decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.activations import activation
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.tile_model import TileModel
from vlcache_jax.models.linear import dense
from vlcache_jax.models.vision.intern import InternVisionTower
from vlcache_jax.models.vision.pixel_shuffle import pixel_shuffle


@static_field
class InternVL(TileModel):
    """An InternVL as a Flax Linen module; its `config` is an `InternVLConfig`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        self.vision = InternVisionTower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.projector_activation, self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        patches = self.vision(pixels)[:, 1:]  # without the class token
        return self.projector(pixel_shuffle(patches, self.config.shuffle))


class Projector(nn.Module):
    """`linear_2(activation(linear_1(norm(x))))`.

    Parameters: norm/{scale, bias} [vision channels], linear_1/kernel [vision channels, D], linear_2/kernel [D, D], with
    biases [D].

    Attributes:
      hidden_size: D, the decoder's hidden size.
      activation: Its name, see `vlcache_jax.models.activations`.
      dtype: Of the computation and of the result. The norm's statistics are float32 whatever it is.
    """

    hidden_size: int
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[..., vision channels] -> [..., D]."""
        norm = nn.LayerNorm(1e-5, dtype=self.dtype, param_dtype=jnp.float32, use_fast_variance=False, name="norm")
        with jax.numpy_dtype_promotion("standard"):  # Flax takes float32 statistics times the scale as it was loaded
            features = norm(features)
        for name in ("linear_1", "linear_2"):
            features = dense(self.hidden_size, self.dtype, name)(features)
            features = activation(self.activation)(features) if name == "linear_1" else features
        return features
