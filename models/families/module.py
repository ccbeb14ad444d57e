"""What the models of all families have in common: a decoder, and images somewhere before it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.attention import Mask, places_of
from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.models.decoder.decoder import Attend, Neurons
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.typing import Embedded, ModelSpec, Params

_apply = automatic(nn.Module.apply)


def in_order(hidden: jax.Array, batch: Batch, blocks: jax.Array | None = None) -> Embedded:
    """Embeddings [batch, length, hidden] at the positions 0, 1, 2 ...; `blocks` as in `Embedded`."""
    lengths = jnp.asarray(batch.lengths)
    positions = jnp.minimum(jax.lax.iota(jnp.int32, batch.length)[None], lengths[:, None] - 1)
    # Not `lengths` itself: a state keeps both, and one buffer cannot be donated twice.
    return Embedded(hidden, positions, positions[:, -1] + 1, blocks=blocks)


def abstract_tiles(rows: int, length: int, tiles: int, side: int) -> Batch:
    """`FamilyModule.abstract_batch` of a model whose images are square tiles of `side` pixels."""
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    pixels = jax.ShapeDtypeStruct((rows, tiles, side, side, 3), jnp.float32)
    return Batch(ids, jax.ShapeDtypeStruct((rows,), jnp.int32), ids, pixels)  # type: ignore[arg-type]


def features_in_order(features: jax.Array, batch: Batch) -> jax.Array:
    """Features of all tiles, [batch * tiles, n, hidden] -> those that tokens take, [batch, length, hidden].

    What stands in the place of text is of no meaning.
    """
    features = features.reshape(batch.size, -1, features.shape[-1])
    if batch.blend_index is not None:
        index, weights = jnp.asarray(batch.blend_index), jnp.asarray(batch.blend_weights)
        found = jnp.take_along_axis(features, index.reshape(batch.size, -1, 1), axis=1, mode="clip")
        found = found.reshape(*index.shape, -1)  # [batch, length, n, hidden]
        return jnp.einsum("btnd,btn->btd", found, weights.astype(features.dtype))
    index = jnp.maximum(jnp.asarray(batch.vision_index), 0)
    return jnp.take_along_axis(features, index[..., None], axis=1, mode="clip")


class FamilyModule(nn.Module):
    """A model as a Flax Linen module; parameters are a plain nested dict with stacked layers.

    A family's module makes its parts in `setup`, among them `self.decoder`, and has `embed` and `abstract_batch`.

    Attributes:
      config: what it is made of, a `ModelConfig`.
      dtype: of the computation.
      remat: recompute decoder layers in the backward pass (for fine-tuning large models): "layers", or "projections"
        to keep what products with weights gave (`models.decoder.decoder.REMAT`).
      layout: how the decoder's weights lie, "stacked" or "apart" (`models.decoder.layout.LAYOUTS`).
      weights: how those of the decoder's projections are coded; None for floats.
    """

    config: Any
    dtype: Any = jnp.float32
    remat: bool | str = False
    layout: str = "stacked"
    weights: WeightCoding | None = None

    @property
    def vision_grid(self) -> int | None:
        """See `ModelSpec.vision_grid`."""
        return None

    @property
    def vision_merge(self) -> int:
        """See `ModelSpec.vision_merge`."""
        return 0

    @property
    def tower_attention(self) -> str | None:
        """See `ModelSpec.tower_attention`."""
        return None

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
            vision_grid=self.vision_grid,
            vision_merge=self.vision_merge,
            tower_attention=self.tower_attention,
            windows=c.decoder.windows,
        )

    def abstract_params(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _abstract_params(self))

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens and `tiles` tiles of images."""
        raise NotImplementedError

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Flax's `apply`, on the mesh of the parameters, whatever the types of its axes (`parallel.mesh`)."""
        with on_mesh_of(variables, args):
            return _apply(self, variables, *args, **kwargs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits of every position, f32 [batch, length, vocab]: `forward` of plain prompts."""
        return self.forward(batch)

    def embed(self, batch: Batch, position_ids: jax.Array | None = None) -> Embedded:
        """Token and image embeddings in prompt order, and where they stand."""
        raise NotImplementedError

    def decode(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        attend: Attend,
        carry: Any = None,
        xs: Any = None,
        layer_inputs: jax.Array | None = None,
        layers: tuple[int, int] | None = None,
        neurons: Neurons | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Runs decoder layers with `attend`; see `Decoder.__call__`."""
        return self.decoder(hidden, positions, attend, carry, xs, layer_inputs, layers, neurons)

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
        """What `unembed` makes logits of, [batch, length, hidden], with the model's own attention; see `forward`."""
        embedded = self.embed(batch, position_ids)
        positions = embedded.positions if positions is None else positions
        windows = self.spec.layer_windows
        places = None if segments is None or not self.spec.windows else places_of(segments)
        mask = Mask(segments=segments, blocks=embedded.blocks, places=places)

        def attend(query, key, value, carry, layer):
            out, _ = ops.layer_attention(Kernels(), windows, layer, query, key, value, mask=mask, with_lse=False)
            return out, carry, None

        layers = jax.lax.iota(jnp.int32, len(windows))
        return self.decoder(embedded.hidden, positions, attend, None, layers, embedded.layer_inputs)[0]

    def forward(
        self,
        batch: Batch,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every position without a cache: training, and the yardstick of every cache.

        Args:
          batch: prompts, answers included when training.
          positions: i32 [batch, length] rotary positions; by default those of the model.
          segments: i32 [batch, length]; see `kernels.attention.Mask`, and `places_of` where layers have a window.
          position_ids: i32 [patches], rows of the tower's position table, for tiles smaller than its full size.

        Returns:
          f32 [batch, length, vocab].
        """
        return self.unembed(self.hidden_states(batch, positions, segments, position_ids))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: FamilyModule) -> Params:
    """`FamilyModule.abstract_params`, for which the whole model is traced: once, however often weights are written."""
    batch = model.abstract_batch(1, 1, 1)
    return jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)["params"]
