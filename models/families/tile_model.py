"""What models have in common whose images are square tiles of one size."""

import jax
import jax.numpy as jnp

from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.families.module import FamilyModule, abstract_tiles, features_in_order, in_order
from vlcache_jax.typing import Embedded


class TileModel(FamilyModule):
    """A model whose tiles yield `config.token_grid` squared visual tokens each; a family's has `encode_images`."""

    @property
    def vision_grid(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.config.token_grid

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens and `tiles` tiles."""
        return abstract_tiles(rows, length, tiles, self.config.vision.image_size)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        raise NotImplementedError

    def blocks(self, visual: jax.Array) -> jax.Array | None:
        """`Embedded.blocks` of visual tokens bool [batch, length]; None where no token sees those behind it."""
        return None

    def embed(self, batch: Batch, position_ids: jax.Array | None = None) -> Embedded:
        """Token and image embeddings in prompt order, one position after another, the features as they are."""
        del position_ids  # tiles have their full size
        embedded = self.decoder.embed(jnp.asarray(batch.tokens))
        rows, tiles = batch.pixels.shape[:2]
        if tiles == 0:
            return in_order(embedded, batch)
        features = self.encode_images(jnp.asarray(batch.pixels).reshape(rows * tiles, *batch.pixels.shape[2:]))
        visual = jnp.asarray(batch.vision_index) != TEXT
        hidden = jnp.where(visual[..., None], features_in_order(features, batch), embedded)
        return in_order(hidden, batch, self.blocks(visual))
