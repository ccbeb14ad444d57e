"""Building the packed store at the end of prefill."""

import jax
import jax.numpy as jnp

from vlcache_jax.state import ALIGNMENT, PackedStore, align, whole_tiles


def capacity(slots: int, layers: int) -> int:
    """Pool size that holds `layers` aligned segments of `slots` slots in all, however they are shared out.

    Example:
      >>> capacity(100, layers=4)
      160
    """
    return whole_tiles(int(align(slots + layers * (ALIGNMENT - 1))))


def pack(
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    order: jax.Array,
    slots: jax.Array,
    pool: int,
    room: int | None = None,
) -> PackedStore:
    """Gathers the kept tokens of all layers into one pool per row and KV head.

    The pool is written once by a gather over its slots: besides the candidates and the pool nothing of the size of
    either is made.

    Args:
      keys: [layers, batch, kv_heads, entries, head_dim], the candidates of each layer.
      values: like `keys`.
      positions: i32 [layers, batch, heads or 1, entries], their prompt positions.
      order: i32 [layers, batch, heads, entries], from `selection.select`; heads is kv_heads, or 1 if they all keep the
        same tokens.
      slots: i32 [layers, batch].
      pool: slots of the pool, from `capacity`.
      room: distance from one segment to the next; by default they follow one another.

    Returns:
      The store; free slots hold position -1 and arbitrary keys and values.
    """
    _, batch, kv_heads, entries, _ = keys.shape
    heads = order.shape[2]
    sizes = align(slots.T) if room is None else jnp.full_like(slots.T, room)  # [batch, layers]
    ends = jnp.cumsum(sizes, axis=1)
    offsets = ends - sizes
    slot = jnp.arange(pool)
    layer = jax.vmap(lambda e: jnp.searchsorted(e, slot, side="right"))(ends)  # [batch, pool]
    layer = jnp.minimum(layer, slots.shape[0] - 1)
    index = slot - jnp.take_along_axis(offsets, layer, axis=1)
    used = index < jnp.take_along_axis(slots.T, layer, axis=1)

    row = jnp.arange(batch)[:, None, None]
    head = jnp.arange(heads)[:, None]
    layer = layer[:, None]  # [batch, 1, pool]
    entry = order[layer, row, head, jnp.minimum(index, entries - 1)[:, None]]
    entry = jnp.minimum(entry, entries - 1)  # free slots
    where = positions[layer, row, head if positions.shape[2] > 1 else 0, entry]
    where = jnp.where(used[:, None], where, -1)

    lane = jnp.arange(kv_heads)[:, None]
    return PackedStore(
        keys=keys[layer, row, lane, entry],
        values=values[layer, row, lane, entry],
        positions=jnp.broadcast_to(where, (batch, kv_heads, pool)),
        offsets=offsets[..., None],
        lengths=slots.T[..., None],
    )
