"""Gemma 3: a SigLIP tower, a projector and a decoder with layers of two kinds; tokens of an image see each other."""

import jax
import jax.numpy as jnp

from vlcache_jax.files.exporting import static_field
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.gemma3.projector import Projector
from vlcache_jax.models.families.tile_model import TileModel
from vlcache_jax.models.vision.siglip import SiglipVisionTower


@static_field
class Gemma3(TileModel):
    """A Gemma 3 as a Flax Linen module; its `config` is a `Gemma3Config`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        self.vision = SiglipVisionTower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.token_grid, c.vision.layer_norm_eps, self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Images f32 [n, height, width, 3] -> projected features [n, tokens of an image, decoder hidden]."""
        return self.projector(self.vision(pixels))

    def blocks(self, visual: jax.Array) -> jax.Array:
        """Images are blocks; see `TileModel.blocks`."""
        return blocks_of(visual)


def blocks_of(visual: jax.Array) -> jax.Array:
    """`Embedded.blocks` of bool [batch, length]: the runs of visual tokens, numbered; images side by side are one."""
    first = visual & ~jnp.pad(visual, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(visual, jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1, -1)
