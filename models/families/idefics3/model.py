"""Idefics3 (https://arxiv.org/abs/2408.12637): a SigLIP tower, pixel shuffle, one matrix and a decoder.

Tiles have the tower's full size, so patch i takes row i of the table of positions. transformers works the rows out from
fractions: the formula of its version 5.24 gives the same (for 26, 27 and 32 rows), that of 4.57.3 in float32 gives all
rows but the first the position of the one before.
"""

import jax

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.tile_model import TileModel
from vlcache_jax.models.linear import dense
from vlcache_jax.models.vision.pixel_shuffle import pixel_shuffle
from vlcache_jax.models.vision.siglip import SiglipVisionTower


@static_field
class Idefics3(TileModel):
    """An Idefics3 or SmolVLM as a Flax Linen module; its `config` is an `Idefics3Config`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        self.vision = SiglipVisionTower(c.vision, self.dtype)
        self.projector = dense(c.decoder.hidden_size, self.dtype, use_bias=False)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        return self.projector(pixel_shuffle(self.vision(pixels), self.config.shuffle))
