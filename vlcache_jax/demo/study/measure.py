"""What a compressed state holds of the attention that decoding with the full cache would spend on the prompt."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.cache.store import PackedStore

Stores = tuple[PackedStore, ...]


class Held(NamedTuple):
    """What each prompt of a batch kept, and what it is worth.

    Attributes:
      mass: f32 [batch]. Share of the attention that the answer's rows spend on the prompt which goes to kept tokens,
        averaged over layers and KV heads; NaN for answers without rows of their own.
      hits: f32 [batch]. Share of the k tokens they attend to most that were kept, k being the number kept there;
        averaged likewise.
      kept: f32 [batch, layers]. Tokens kept, averaged over KV heads.
    """

    mass: jax.Array
    hits: jax.Array
    kept: jax.Array


@jax.jit
def held(stores: Stores, lengths: jax.Array, attention: jax.Array) -> Held:
    """Measures what prompts kept.

    Args:
      stores: of the state as `prefill` returned it.
      lengths: i32 [batch], of the prompts.
      attention: f32 [layers, batch, kv_heads, length], from `answer_attention`; the columns of what was compressed.
    """
    kv_heads, length = attention.shape[2:]
    kept = kept_tokens(stores, length, kv_heads)  # bool, like `attention`
    count = jnp.sum(kept, axis=-1)
    total = jnp.sum(attention, axis=-1)
    mass = jnp.sum(jnp.where(kept, attention, 0), axis=-1) / jnp.where(total > 0, total, jnp.nan)
    inside = jnp.where(jax.lax.iota(jnp.int32, length)[None, None] < lengths[:, None, None], attention, -1)
    best = largest(inside, count[..., None])
    hits = jnp.sum(best & kept, axis=-1) / jnp.maximum(count, 1)
    return Held(
        mass=jnp.mean(mass, axis=(0, 2)),
        hits=jnp.where(jnp.isnan(mass).any(axis=(0, 2)), jnp.nan, jnp.mean(hits, axis=(0, 2))),
        kept=jnp.mean(count.astype(jnp.float32), axis=2).T,
    )


def store_bytes(stores: Stores) -> int:
    """Bytes of the buffers that hold the prompts."""
    return sum(store.nbytes for store in stores)


@partial(jax.jit, static_argnames=("length", "kv_heads"))
def kept_tokens(stores: Stores, length: int, kv_heads: int) -> jax.Array:
    """Which prompt tokens are held, in any of the stores.

    Args:
      stores: of the state as `prefill` returned it.
      length: of the padded prompts.
      kv_heads: of the model; several may share a lane.

    Returns:
      bool [layers, batch, kv_heads, length].
    """
    batch, layers = stores[0].lengths.shape[:2]
    row, head = jax.lax.iota(jnp.int32, batch)[:, None, None], jax.lax.iota(jnp.int32, kv_heads)[:, None]

    def of_layer(layer: jax.Array) -> jax.Array:
        kept = jnp.zeros((batch, kv_heads, length), bool)
        for store in stores:
            where = store.kept_positions(layer)
            kept = kept.at[row, head, jnp.where(where < 0, length, where)].set(True, mode="drop")
        return kept

    return jax.lax.map(of_layer, jax.lax.iota(jnp.int32, layers))
