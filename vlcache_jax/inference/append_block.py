"""Appending several tokens at once: one block of queries that sees the read-only stores, and itself causally.

    stores   | kept prompt | earlier turns |
    block                                  | What colour is it ? <pad> <pad> |

The block's keys and values become a store of their own; or they are joined to those of the earlier turns, so that the
number of stores, and with it the program, stays the same from turn to turn.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.store import PackedStore, regular_pool
from vlcache_jax.inference.forward import embed_text, last_logits, run_layers
from vlcache_jax.kernels.merge import merge
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.typing import Params, VisionLanguageModel


@partial(jax.jit, static_argnames=("model", "room", "old_room", "kernels"))
@automatic
def append_block(
    model: VisionLanguageModel,
    params: Params,
    stores: tuple[PackedStore, ...],
    next_position: jax.Array,
    next_index: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    room: int,
    old_room: int,
    kernels: Kernels,
) -> tuple[jax.Array, PackedStore]:
    """Runs a block of tokens behind what the stores hold.

    Args:
      model, params, kernels: as in `generate`.
      stores: what comes before, of as many rows as the block or a divisor of it (see `union_attention`).
      next_position: i32 [context rows], rotary position of the block's first token.
      next_index: i32 [context rows], how many tokens came before it.
      tokens: i32 [rows, length], right-padded.
      lengths: i32 [rows], 1 <= lengths <= length.
      room: slots of a layer in the new store, a multiple of `geometry.ALIGNMENT`.
      old_room: slots of a layer in the last of the stores, which is to be joined with the new one; 0 to keep it apart.

    Returns:
      (logits after the last token of each row f32 [rows, vocab], the new store).
    """
    spec = model.spec
    hidden, keys, values, first = run_block(model, params, stores, next_position, next_index, tokens, lengths, kernels)
    logits = last_logits(model, params, hidden, lengths)
    # [layers, rows, kv_heads, length, head_dim] -> [rows, kv_heads, layers, length, head_dim]
    keys, values = (jnp.moveaxis(x, 0, 2) for x in (keys, values))
    old = stores[-1].lengths[:, 0, 0] if old_room else jnp.zeros_like(lengths)
    if old_room:
        keys, values = (
            _join(x[:, :, : spec.num_layers * old_room].reshape(*y.shape[:3], old_room, -1), y, old, room)
            for x, y in zip((stores[-1].keys, stores[-1].values), (keys, values))
        )
    keys, values = regular_pool(keys, room), regular_pool(values, room)
    return logits, PackedStore.regular(keys, values, old + lengths, spec.num_layers, room, first - old)


def run_block(
    model: VisionLanguageModel,
    params: Params,
    stores: tuple[PackedStore, ...],
    next_position: jax.Array,
    next_index: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The layers of `append_block`.

    Returns:
      (what logits are made of [rows, length, hidden], keys and values [layers, rows, kv_heads, length, head_dim], how
      many tokens came before each row i32 [rows]).
    """
    rows, length = tokens.shape
    spec = model.spec
    start, first = (jnp.repeat(x, rows // x.shape[0], total_repeat_length=rows) for x in (next_position, next_index))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, carry: Any, layer: jax.Array) -> Any:
        windows, since = spec.layer_windows, None
        block, lse = ops.layer_attention(kernels, windows, layer, query, key, value, lengths, with_lse=True)
        assert lse is not None
        if spec.windows:
            window = jnp.asarray([w or spec.max_positions for w in windows], jnp.int32)[layer]
            since = first[:, None] + 1 - window + jax.lax.iota(jnp.int32, length)[None]
        before = ops.union_attention(kernels, query, [store.layer(layer, since) for store in stores])
        out, _ = merge([(block.astype(jnp.float32), lse.astype(jnp.float32)), before])
        return out, carry, tuple(x.swapaxes(1, 2).astype(spec.dtype) for x in (key, value))

    embedded, layers = embed_text(model, params, tokens, start, lengths), jax.lax.iota(jnp.int32, spec.num_layers)
    hidden, _, (keys, values) = run_layers(model, params, embedded, attend, None, layers)
    return hidden, keys, values, first


def _join(before: jax.Array, block: jax.Array, lengths: jax.Array, room: int) -> jax.Array:
    """Appends [rows, kv_heads, layers, length, head_dim] to the first `lengths` slots of what came before."""
    slot = jax.lax.iota(jnp.int32, room)[None]
    n = lengths[:, None]
    entry = jnp.where(slot < n, slot, before.shape[3] + jnp.clip(slot - n, 0, block.shape[3] - 1))
    return jnp.take_along_axis(jnp.concatenate([before, block], axis=3), entry[:, None, None, :, None], axis=3)
