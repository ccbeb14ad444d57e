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
    lanes: int | None = None,
) -> PackedStore:
    """Gathers the kept tokens of all layers into one pool per row and lane.

    The pool is written once by a gather over its slots: besides the candidates and the pool nothing of the size of
    either is made.

    Args:
      keys: [layers, batch, kv_heads, entries, head_dim], the candidates of each layer.
      values: like `keys`.
      positions: i32 [layers, batch, heads or 1, entries], their prompt positions.
      order: i32 [layers, batch, heads, entries], from `selection.select`; heads is kv_heads, or 1 if they all keep the
        same tokens.
      slots: i32 [layers, batch]; [layers, batch, kv_heads] if lanes are shared.
      pool: slots of the pool, from `capacity`.
      lanes: lanes that the KV heads share, with slots of their own; None for a lane each and the same slots.

    Returns:
      The store; free slots hold position -1 and arbitrary keys and values.
    """
    layers, batch, kv_heads, entries, _ = keys.shape
    # The segments of a lane one after another: layers, and the heads of each layer.
    shared = 1 if lanes is None else lanes  # tables of segments
    group = 1 if lanes is None else kv_heads // lanes  # heads of a lane
    counts = slots.reshape(layers, batch, shared, group).transpose(1, 2, 0, 3).reshape(batch, shared, layers * group)
    sizes = align(counts)
    ends = jnp.cumsum(sizes, axis=2)
    offsets = ends - sizes
    slot = jnp.arange(pool)
    segment = jax.vmap(jax.vmap(lambda e: jnp.searchsorted(e, slot, side="right")))(ends)  # [batch, lanes or 1, pool]
    segment = jnp.minimum(segment, layers * group - 1)
    index = slot - jnp.take_along_axis(offsets, segment, axis=2)
    used = index < jnp.take_along_axis(counts, segment, axis=2)

    row = jnp.arange(batch)[:, None, None]
    lane = jnp.arange(kv_heads // group)[:, None]
    layer, head = segment // group, lane * group + segment % group
    entry = order[layer, row, head if order.shape[2] > 1 else 0, jnp.minimum(index, entries - 1)]
    entry = jnp.minimum(entry, entries - 1)  # free slots
    where = positions[layer, row, head if positions.shape[2] > 1 else 0, entry]
    where = jnp.where(used, where, -1)

    def table(x: jax.Array) -> jax.Array:  # [batch, layers, kv_heads or 1]
        return x.reshape(batch, shared, layers, group).swapaxes(1, 2).reshape(batch, layers, shared * group)

    return PackedStore(
        keys=keys[layer, row, head, entry],
        values=values[layer, row, head, entry],
        positions=jnp.broadcast_to(where, (batch, kv_heads // group, pool)),
        offsets=table(offsets),
        lengths=table(counts),
    )
