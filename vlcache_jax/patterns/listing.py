"""From what a pattern chose to the lists of the op: heads united, later keys left out, the best where room ends."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.kernels.sparse_attention import Lists, Order
from vlcache_jax.patterns.maps import united
from vlcache_jax.patterns.pattern import Chosen, Moved, Pattern, PatternInputs


class Told(NamedTuple):
    """What a layer's lists hold, of each list head.

    Attributes:
      density: f32 [batch, list heads], listed blocks / the blocks of causal attention; a single column counts for a
        part of a block, 1 / `Pattern.block`, wherever queries see it.
      overflow: i32 [batch, list heads], blocks and single columns that were wanted and had no room.
    """

    density: jax.Array
    overflow: jax.Array


def lists_of(pattern: Pattern, inputs: PatternInputs, chosen: Chosen) -> tuple[Lists, Told]:
    """The lists of a layer, ascending, and what they hold."""
    block, blocks, lengths = inputs.block, inputs.blocks, inputs.lengths
    list_heads = inputs.key.shape[2] if pattern.heads == "group" else len(inputs.heads)
    number = jax.lax.iota(jnp.int32, blocks)
    rows = -(-lengths // block)  # blocks of queries with a token
    causal = (inputs.distance >= 0)[None] & (number[None] < rows[:, None])[..., None]
    causal = causal[:, None]  # [batch, 1, blocks, blocks]
    own = (inputs.distance == 0)[None, None]
    keep = united(chosen.blocks, list_heads) | own
    keep = jnp.broadcast_to(keep & causal, (len(lengths), list_heads, blocks, blocks))
    rank = -inputs.distance[None, None].astype(jnp.float32) if chosen.rank is None else chosen.rank
    rank = jnp.where(own, jnp.inf, jnp.nan_to_num(united(rank, list_heads), nan=-jnp.inf))
    ids, counts, overflow = _best(keep, rank, min(pattern.most_blocks(blocks), _capacity(pattern, blocks)))
    work = jnp.sum(counts, axis=2).astype(jnp.float32)
    loose, room = None, min(pattern.columns(inputs.length), inputs.length)
    if chosen.columns is not None and room:
        columns = united(chosen.columns, list_heads) & inputs.valid[:, None]
        wanted = jnp.sum(columns, axis=2, dtype=jnp.int32)
        if room < inputs.length:
            rank = jnp.zeros(columns.shape) if chosen.column_rank is None else united(chosen.column_rank, list_heads)
            rank = jnp.where(columns, jnp.maximum(rank, jnp.finfo(jnp.float32).min), -jnp.inf)
            columns = largest(rank, jnp.full((1,) * 3, room)) & columns
        loose = indices(columns, room)
        overflow += wanted - jnp.sum(columns, axis=2, dtype=jnp.int32)
        behind = jnp.maximum(
            rows[:, None] - (jax.lax.iota(jnp.int32, inputs.length) // block)[None], 0
        )  # blocks that see a key
        work += jnp.sum(jnp.where(columns, behind[:, None], 0), axis=2).astype(jnp.float32) / block
    of_all = jnp.sum(causal, axis=(2, 3)).astype(jnp.float32)
    return Lists(ids, counts, loose, block, block), Told(work / of_all, overflow)


def moved_lists_of(pattern: Pattern, inputs: PatternInputs, moved: Moved) -> tuple[Lists, Told]:
    """The lists of a layer's moved tokens, ascending, and what they hold of causal attention's blocks."""
    block, blocks, lengths = inputs.block, inputs.blocks, inputs.lengths[:, None, None]
    places = moved.order
    limits = jnp.where(inputs.valid, moved.limits, 0)[:, None]
    limits = jnp.take_along_axis(jnp.broadcast_to(limits, places.shape), places, axis=2)

    def of_blocks(x: jax.Array, filler: int) -> jax.Array:  # [batch, list heads, length] -> [..., blocks, block]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - x.shape[2])), constant_values=filler)
        return x.reshape(*x.shape[:2], blocks, block)

    earliest = jnp.min(of_blocks(places, inputs.length), axis=3)
    latest = jnp.max(of_blocks(jnp.where(places < lengths, places, -1), -1), axis=3)
    furthest = jnp.max(of_blocks(limits, 0), axis=3)
    keep = moved.blocks & (earliest[:, :, None] < furthest[..., None])
    ids, counts, overflow = _best(keep, latest[:, :, None].astype(jnp.float32), _capacity(pattern, blocks))
    rows = -(-inputs.lengths // block)
    density = jnp.sum(counts, axis=2).astype(jnp.float32) / (rows * (rows + 1) // 2).astype(jnp.float32)[:, None]
    return Lists(ids, counts, None, block, block, Order(places, limits)), Told(density, overflow)


def _capacity(pattern: Pattern, blocks: int) -> int:
    return max(1, math.ceil(pattern.capacity * blocks))


def _best(keep: jax.Array, rank: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids and counts of lists of the blocks to keep, as many as there is room for, and how many were left out.

    Args:
      keep: bool [batch, list heads, blocks, blocks].
      rank: f32 that goes with it; the highest stay.
      capacity: room of a list.
    """
    wanted = jnp.sum(keep, axis=(2, 3), dtype=jnp.int32)
    if capacity < keep.shape[3]:
        rank = jnp.where(keep, jnp.maximum(rank, jnp.finfo(jnp.float32).min), -jnp.inf)
        keep = largest(rank, jnp.full((1,) * 4, capacity)) & keep
    counts = jnp.sum(keep, axis=3, dtype=jnp.int32)
    return indices(keep, capacity), counts, wanted - jnp.sum(counts, axis=2)
