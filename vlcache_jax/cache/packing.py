"""Building the packed store at the end of prefill."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import align, segment_alignment
from vlcache_jax.cache.store import PackedStore, lanes_spec, store_specs
from vlcache_jax.kernels.precision import PRECISIONS, Coded
from vlcache_jax.kernels.rotation import rotated
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import axis_size, local

_BLOCK = 128  # slots quantised at once


def pack(
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    order: jax.Array,
    slots: jax.Array,
    pool: int,
    lanes: int | None = None,
    bits: int | str | None = None,
    rooms: tuple[int, ...] | None = None,
    places: jax.Array | None = None,
    starts: tuple[int, ...] | None = None,
) -> PackedStore:
    """Gathers the kept tokens of all layers into one pool per row and lane.

    The pool is written once by a gather over its slots: besides the candidates and the pool nothing of the size of
    either is made. A quantised pool is written block by block, so no float copy of it is made either.

    Args:
      keys: [layers, batch, kv_heads, entries, head_dim], the candidates of each layer; with `starts` they lie one after
        another, [batch, kv_heads, slots, head_dim].
      values: like `keys`.
      positions: i32 [layers, batch, heads or 1, entries], their positions.
      order: i32 [layers, batch, heads, entries], from `selection.select_layers`; heads is kv_heads, or 1 if they all
        keep the same tokens.
      slots: i32 [layers, batch]; [layers, batch, kv_heads] if lanes are shared.
      pool: slots of the pool, from `geometry.capacity`.
      lanes: lanes that the KV heads share, with slots of their own; None for a lane each and the same slots. On a mesh
        that cannot split them every device holds all.
      bits: the precision of a store of codes (`kernels.precision`).
      rooms: of each layer, the distance from its segments to the next; by default they follow one another.
      places: i32 [layers, batch, length], the place in the prompt of each position; None: they are the same.
      starts: where those of each layer begin, if layers hand on different numbers of them.

    Returns:
      The store; free slots hold position -1 and arbitrary keys and values.
    """
    over: Any
    batch, kv_heads = slots.shape[1], keys.shape[-3]
    rows, over = lanes_spec(batch, lanes or kv_heads)
    per_device = lanes and lanes // axis_size(over)

    def run(*arrays: Any) -> PackedStore:
        return _pack(*arrays, pool=pool, lanes=per_device, bits=bits, rooms=rooms, starts=starts)

    def place(x: jax.Array | None) -> Any:  # [layers, batch, heads or 1, ...]
        if x is None:
            return None
        return PartitionSpec(None, rows, over) if x.ndim > 2 and x.shape[2] > 1 else PartitionSpec(None, rows)

    arrays = (keys, values, positions, order, slots, places)
    inputs = (*map(place, arrays[:-1]), None if places is None else PartitionSpec(None, rows))
    if starts is not None:
        inputs = (PartitionSpec(rows, over),) * 2 + inputs[2:]
    specs = store_specs(batch, lanes or kv_heads, per_head=slots.ndim > 2, bits=bits)
    return local(run, inputs, specs)(*arrays)


def _pack(
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    order: jax.Array,
    slots: jax.Array,
    places: jax.Array | None,
    *,
    pool: int,
    lanes: int | None,
    bits: int | str | None,
    rooms: tuple[int, ...] | None,
    starts: tuple[int, ...] | None,
) -> PackedStore:
    """`pack` on one device, for its rows and lanes."""
    layers, batch, entries, kv_heads = *slots.shape[:2], order.shape[3], keys.shape[-3]
    # The segments of a lane one after another: layers, and the heads of each layer.
    shared = 1 if lanes is None else lanes  # tables of segments
    group = 1 if lanes is None else kv_heads // lanes  # heads of a lane
    counts = slots.reshape(layers, batch, shared, group).transpose(1, 2, 0, 3).reshape(batch, shared, layers * group)
    sizes = align(counts, segment_alignment(bits))
    if rooms is not None:
        sizes = jnp.broadcast_to(jnp.repeat(jnp.asarray(rooms, jnp.int32), group), counts.shape)
    ends = jnp.cumsum(sizes, axis=2, dtype=jnp.int32)
    offsets = ends - sizes
    slot = jax.lax.iota(jnp.int32, pool)[None, None, None]
    # [batch, lanes or 1, segments, pool]: compared with every segment, as a TPU gathers number by number, slowly.
    start, end, filled = (x[..., None] for x in (offsets, ends, offsets + counts))
    after, used = slot >= end, jnp.any((slot >= start) & (slot < filled), axis=2)
    segment = jnp.minimum(jnp.sum(after, axis=2, dtype=jnp.int32), layers * group - 1)
    index = slot[:, :, 0] - jnp.max(jnp.where(after, end, 0), axis=2)

    row = jax.lax.iota(jnp.int32, batch)[:, None, None]
    lane = jax.lax.iota(jnp.int32, kv_heads // group)[None, :, None]
    layer, head = segment // group, lane * group + segment % group
    entry = order[layer, row, head if order.shape[2] > 1 else 0, jnp.minimum(index, entries - 1)]
    entry = jnp.minimum(entry, entries - 1)  # free slots
    where = positions[layer, row, head if positions.shape[2] > 1 else 0, entry]
    if places is not None:
        where = places[layer, row, jnp.minimum(where, places.shape[2] - 1)]
    where = jnp.where(used, where, -1)

    def table(x: jax.Array) -> jax.Array:  # [batch, layers, kv_heads or 1]
        return x.reshape(batch, shared, layers, group).swapaxes(1, 2).reshape(batch, layers, shared * group)

    rest: dict[str, Any] = {
        "positions": jnp.broadcast_to(where, (batch, kv_heads // group, pool)),
        "offsets": table(offsets),
        "lengths": table(counts),
    }

    def of(x: jax.Array, layer: jax.Array, head: jax.Array, entry: jax.Array) -> jax.Array:
        return x[layer, row, head, entry] if starts is None else x[row, head, _start(starts, layer) + entry]

    if bits is None:
        return PackedStore(of(keys, layer, head, entry), of(values, layer, head, entry), **rest)

    def read(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole = (layer, head, entry, where >= 0)
        l, h, e, valid = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in whole)
        return of(keys, l, h, e), of(values, l, h, e), valid

    codes = quantise_into(empty_codes((batch, kv_heads // group, pool, keys.shape[-1]), bits), read, 0, pool, bits)
    return PackedStore(**codes._asdict(), bits=bits, **rest)


def _start(starts: tuple[int, ...], layer: jax.Array) -> jax.Array:
    """starts[layer], by arithmetic: a TPU reads tables number by number."""
    rooms = np.diff(starts)
    least = int(rooms.min(initial=starts[-1]))
    larger = [(i, int(room) - least) for i, room in enumerate(rooms) if room > least]
    return least * layer + sum((jnp.where(layer > i, more, 0) for i, more in larger), start=jnp.zeros_like(layer))


def empty_codes(shape: tuple[int, ...], bits: int | str) -> Coded:
    """The buffers of a store of codes [batch, lanes, slots, head_dim]."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), PRECISIONS[bits].shapes(shape))


def quantise_into(
    buffers: Coded,
    read: Callable[[jax.Array, int], tuple[jax.Array, jax.Array, jax.Array]],
    start: jax.Array | int,
    count: int,
    bits: int | str,
) -> Coded:
    """Quantises `count` slots into the pool's slots from `start` on, a block at a time.

    Args:
      buffers: of the pool.
      read: (first slot, size) -> keys and values [batch, lanes, size, head_dim], bool [batch, lanes or 1, size] which
        of them count; slots from 0 to `count`.
      start: a multiple of the alignment.
      count: a multiple of the alignment.
      bits: see `kernels.precision`.

    Returns:
      The buffers, updated in place where the compiler can.
    """
    size = _BLOCK if count % _BLOCK == 0 else segment_alignment(bits)
    precision = PRECISIONS[bits]

    def step(i: jax.Array, buffers: Coded) -> Coded:
        keys, values, valid = read(i * size, size)
        if precision.rotated:
            keys, values = (rotated(x.astype(jnp.float32)) for x in (keys, values))
        new = precision.encode(keys, values, jnp.broadcast_to(valid, keys.shape[:-1]))
        written = (
            span and jax.lax.dynamic_update_slice_in_dim(x, n, (start + i * size) // span[1], span[0])
            for x, n, span in zip(buffers, new, precision.spans, strict=True)
        )
        return Coded(*written)

    return jax.lax.fori_loop(0, count // size, step, varying(buffers, read(jnp.int32(0), size)))


@dataclasses.dataclass(frozen=True)
class Selected:
    """What layers have chosen from what they handed on; how it is stored comes next.

    Attributes:
      keys, values, positions, order, slots, lanes: as in `pack`.
      lengths: i32 [layers, batch], tokens that a layer had to choose from.
      others: like `order`, the tokens of the prompt that were not chosen; None where nobody wants them.
      windowed: bool [layers], which have a window: what that has left behind is never seen again. None if none has.
      places, starts: as in `pack`.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    order: jax.Array
    slots: jax.Array
    lengths: jax.Array
    lanes: int | None = None
    others: jax.Array | None = None
    windowed: jax.Array | None = None
    places: jax.Array | None = None
    starts: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        """KV heads of a lane."""
        return self.keys.shape[-3] // self.lanes if self.lanes else 1

    def pack(self, pool: int, bits: int | str | None = None, rooms: tuple[int, ...] | None = None) -> PackedStore:
        """See `pack`; what is quantised has no derivative."""
        keys, values = self.keys, self.values
        if bits is not None:
            keys, values = jax.lax.stop_gradient((keys, values))
        chosen = (keys, values, self.positions, self.order, self.slots)
        return pack(*chosen, pool, self.lanes, bits, rooms, self.places, self.starts)
