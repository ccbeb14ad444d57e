"""LLaVA-1.5 and LLaVA-NeXT: a CLIP tower, a projector and a decoder.

The two differ only in how images become tiles and where each visual token takes its feature from; the processor works
that out on the host (`Batch.vision_index`), so the model is one gather for both.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlcache_jax.inputs import NEWLINE, TEXT, Batch
from vlcache_jax.kernels.attention import Mask
from vlcache_jax.models.decoder.decoder import Attend, Decoder
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.projector import Projector
from vlcache_jax.models.vision.clip import ClipVisionTower
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.typing import ModelSpec

_apply = automatic(nn.Module.apply)


class Llava(nn.Module):
    """A LLaVA as a Flax Linen module; parameters are a plain nested dict with stacked layers.

    Attributes:
      config: what it is made of.
      dtype: of the computation.
      remat: recompute decoder layers in the backward pass (for fine-tuning large models).
    """

    config: LlavaConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.vision = ClipVisionTower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.projector_activation, c.projector_bias, dtype=self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat)
        if c.grid_pinpoints:
            self.image_newline = self.param(
                "image_newline", nn.initializers.normal(0.02), (c.decoder.hidden_size,), jnp.float32
            )

    @property
    def spec(self) -> ModelSpec:
        """What caching and generation need to know."""
        c = self.config
        fillers = (i for i in (c.pad_token_id, *c.eos_token_ids, 0) if i is not None)
        return ModelSpec(
            num_layers=c.decoder.num_layers,
            num_kv_heads=c.decoder.num_kv_heads,
            head_dim=c.decoder.head_dim,
            max_positions=c.decoder.extended_positions,
            dtype=self.dtype,
            eos_token_ids=c.eos_token_ids,
            # Finished rows are fed it, so it must have a row of the table; a fine-tune's added padding token may not.
            pad_token_id=next(i for i in fillers if 0 <= i < c.decoder.vocab_size),
            vision_grid=0 if c.feature_select == "full" else c.vision.grid_size,
        )

    def abstract_params(self) -> dict[str, Any]:
        """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
        size = self.config.vision.image_size
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.float32)
        batch = Batch(ids, jax.ShapeDtypeStruct((1,), jnp.int32), ids, pixels)  # type: ignore[arg-type]
        return jax.eval_shape(lambda batch: self.init(jax.random.key(0), batch), batch)["params"]

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Flax's `apply`, on the mesh of the parameters, whatever the types of its axes (`parallel.mesh`)."""
        with on_mesh_of(variables, args):
            return _apply(self, variables, *args, **kwargs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits of every position, f32 [batch, length, vocab]: `forward` of plain prompts."""
        return self.forward(batch)

    def encode_images(self, pixels: jax.Array, position_ids: jax.Array | None = None) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        features = self.vision(pixels, self.config.feature_layers, position_ids)
        if self.config.feature_select == "default":
            features = features[:, 1:]  # without the class token
        return self.projector(features)

    def embed(self, batch: Batch, position_ids: jax.Array | None = None) -> jax.Array:
        """Token and image embeddings in prompt order, [batch, length, decoder hidden]."""
        embedded = self.decoder.embed(jnp.asarray(batch.tokens))
        rows, tiles = batch.pixels.shape[:2]
        if tiles == 0:
            return embedded
        features = self.encode_images(
            jnp.asarray(batch.pixels).reshape(rows * tiles, *batch.pixels.shape[2:]), position_ids
        )
        features = features.reshape(rows, -1, features.shape[-1])
        index = jnp.asarray(batch.vision_index)
        visual = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1, mode="clip")
        if self.config.grid_pinpoints:
            visual = jnp.where((index == NEWLINE)[..., None], self.image_newline.astype(self.dtype), visual)
        return jnp.where((index == TEXT)[..., None], embedded, visual)

    def decode(
        self, hidden: jax.Array, positions: jax.Array, attend: Attend, carry: Any = None, xs: Any = None
    ) -> tuple[jax.Array, Any, Any]:
        """Runs the decoder layers with `attend`; see `Decoder.__call__`."""
        return self.decoder(hidden, positions, attend, carry, xs)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeddings of generated tokens, i32 [batch, length] -> [batch, length, hidden]."""
        return self.decoder.embed(tokens)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary embedding of x [batch, length, heads, head_dim] at positions i32 [batch, length]; no parameters."""
        return self.decoder.rotate(x, positions)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden] -> f32 logits [..., vocab]."""
        return self.decoder.unembed(hidden)

    def hidden_states(
        self,
        batch: Batch,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """What `unembed` makes logits of, [batch, length, hidden], with full causal attention; see `forward`."""
        hidden = self.embed(batch, position_ids)
        if positions is None:
            index = jax.lax.iota(jnp.int32, batch.length)[None]
            positions = jnp.minimum(index, jnp.asarray(batch.lengths)[:, None] - 1)

        def attend(query, key, value, carry, xs):
            mask = Mask(segments=segments)
            return ops.attention(Kernels(), query, key, value, mask=mask, with_lse=False)[0], carry, None

        return self.decoder(hidden, positions, attend)[0]

    def forward(
        self,
        batch: Batch,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every position with full causal attention: training, and the yardstick of every cache.

        Args:
          batch: prompts, answers included when training.
          positions: i32 [batch, length] rotary positions; 0, 1, 2, ... by default.
          segments: i32 [batch, length]; see `kernels.attention`.
          position_ids: i32 [patches], rows of the tower's position table, for tiles smaller than its full size.

        Returns:
          f32 [batch, length, vocab].
        """
        return self.unembed(self.hidden_states(batch, positions, segments, position_ids))
