"""The Qwen-VLs: a vision tower for images of any size, and a decoder with positions on three axes."""

import jax
import jax.numpy as jnp

from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import static_field
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.module import FamilyModule, in_order
from vlcache_jax.models.families.qwen_vl.positions import axes_positions
from vlcache_jax.models.vision.qwen import FRAME, TIME, QwenVisionTower
from vlcache_jax.typing import Embedded


@static_field
class QwenVL(FamilyModule):
    """A Qwen-VL as a Flax Linen module; its `config` is a `QwenVLConfig`. See `FamilyModule`."""

    def setup(self) -> None:
        self.vision = QwenVisionTower(self.config.vision, self.dtype)
        self.decoder = Decoder(self.config.decoder, self.dtype, self.remat, self.layout, self.weights)

    @property
    def vision_grid(self) -> int:
        """0: images have grids of their own."""
        return 0

    @property
    def vision_merge(self) -> int:
        """Patches along one side of what becomes a visual token."""
        return self.config.vision.merge_size

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens and `tiles` patches of still images."""
        vision = self.config.vision
        patches = -(-tiles // vision.merged) * vision.merged
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        pixels = jax.ShapeDtypeStruct((rows, patches, 3 * vision.patch_size**2), jnp.float32)
        cells = jax.ShapeDtypeStruct((rows, patches, 4), jnp.int32)
        return Batch(ids, jax.ShapeDtypeStruct((rows,), jnp.int32), ids, pixels, cells)  # type: ignore[arg-type]

    def embed(self, batch: Batch, position_ids: jax.Array | None = None) -> Embedded:
        """Token and image embeddings in prompt order, positions on three axes, and what the first layers add."""
        if position_ids is not None:
            raise InputError("position_ids are for towers with a table of positions: leave them out")
        embedded = self.decoder.embed(jnp.asarray(batch.tokens))
        if batch.pixels.shape[1] == 0:
            return in_order(embedded, batch)
        if batch.cells is None:
            raise InputError(
                f"the batch has pixels {list(batch.pixels.shape)} but no cells, which say where each patch lies: build "
                "it with the model's processor"
            )
        features, deepstack = self.vision(jnp.asarray(batch.pixels), jnp.asarray(batch.cells))
        index = jnp.asarray(batch.vision_index)
        visual, source = index != TEXT, jnp.maximum(index, 0)

        def of_tokens(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, source[..., None], axis=1, mode="clip")

        hidden = jnp.where(visual[..., None], of_tokens(features), embedded)
        vision = self.config.vision
        cells = of_tokens(jnp.asarray(batch.cells)[:, :: vision.merged])  # of a feature's first patch
        unit = jnp.asarray([1, vision.merge_size, vision.merge_size])
        places = (cells[..., TIME:] // unit[None, None]).swapaxes(1, 2)
        more = None
        if deepstack is not None:
            more = jnp.where(visual[None, ..., None], jax.vmap(of_tokens)(deepstack), 0)
        return Embedded(hidden, *axes_positions(jnp.asarray(batch.lengths), visual, cells[..., FRAME], places), more)
