"""Gemma 3: a SigLIP tower, a projector and a decoder with layers of two kinds; tokens of an image see each other."""

import jax
import jax.numpy as jnp

from vlcache_jax.files.exporting import static_field
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.gemma3.projector import Projector
from vlcache_jax.models.families.module import FamilyModule, abstract_tiles, features_in_order, in_order
from vlcache_jax.models.vision.siglip import SiglipVisionTower
from vlcache_jax.typing import Embedded


@static_field
class Gemma3(FamilyModule):
    """A Gemma 3 as a Flax Linen module; its `config` is a `Gemma3Config`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        self.vision = SiglipVisionTower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.token_grid, c.vision.layer_norm_eps, self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)

    @property
    def vision_grid(self) -> int:
        """Visual tokens along one side of an image."""
        return self.config.token_grid

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens and `tiles` images."""
        return abstract_tiles(rows, length, tiles, self.config.vision.image_size)

    def encode_images(self, pixels: jax.Array, position_ids: jax.Array | None = None) -> jax.Array:
        """Images f32 [n, height, width, 3] -> projected features [n, tokens of an image, decoder hidden]."""
        return self.projector(self.vision(pixels, position_ids=position_ids))

    def embed(self, batch: Batch, position_ids: jax.Array | None = None) -> Embedded:
        """Scaled token embeddings, and features as they are, in prompt order; images are blocks."""
        embedded = self.decoder.embed(jnp.asarray(batch.tokens))
        rows, tiles = batch.pixels.shape[:2]
        if tiles == 0:
            return in_order(embedded, batch)
        pixels = jnp.asarray(batch.pixels).reshape(rows * tiles, *batch.pixels.shape[2:])
        features = features_in_order(self.encode_images(pixels, position_ids), batch)
        visual = jnp.asarray(batch.vision_index) != TEXT
        return in_order(jnp.where(visual[..., None], features, embedded), batch, blocks_of(visual))


def blocks_of(visual: jax.Array) -> jax.Array:
    """`Embedded.blocks` of bool [batch, length]: the runs of visual tokens, numbered; images side by side are one."""
    first = visual & ~jnp.pad(visual, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(visual, jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1, -1)
