"""InternVL: its own tower, pixel shuffle, a projector and a decoder."""

import jax

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.projector import Projector
from vlcache_jax.models.families.tile_model import TileModel
from vlcache_jax.models.vision.intern import InternVisionTower
from vlcache_jax.models.vision.pixel_shuffle import pixel_shuffle


@static_field
class InternVL(TileModel):
    """An InternVL as a Flax Linen module; its `config` is an `InternVLConfig`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        self.vision = InternVisionTower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.projector_activation, norm=True, dtype=self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        patches = self.vision(pixels)[:, 1:]  # without the class token
        return self.projector(pixel_shuffle(patches, self.config.shuffle))
