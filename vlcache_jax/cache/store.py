"""The kept part of a prompt: one pool for all layers of a row, of a static size, which every prompt splits differently.

    keys[b, h]   | layer 0 ............ free | layer 1 .. free | layer 2 ...... free |  free  |
                 ^ offsets[b, 0] = 0         ^ offsets[b, 1]   ^ offsets[b, 2]
                 <-------------------> lengths[b, 0]

Segments start at multiples of `geometry.ALIGNMENT`, the rows of a TPU tile in bfloat16; of a quantised store at
multiples of its group.

Head-adaptive methods give the KV heads of a layer different numbers of slots. Then several heads share a lane, and
what is known beforehand is the sum over the heads of a lane. KV head h lies in lane h * lanes // kv_heads; with 4 KV
heads in 2 lanes:

    keys[b, 0]   | layer 0, head 0 .. | layer 0, head 1 ....... | layer 1, head 0 ... | layer 1, head 1 | ...
    keys[b, 1]   | layer 0, head 2 ....... | layer 0, head 3 | layer 1, head 2 .......... | layer 1, ...
                 ^ offsets[b, 0, 2] = 0    ^ offsets[b, 0, 3]
                 <---------------------> lengths[b, 0, 2]

Stores are made by `packing.pack`, or, where every layer has the same room, by `PackedStore.regular`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import regular_slots, whole_tiles
from vlcache_jax.files.exporting import exportable
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.kernels.precision import PRECISIONS
from vlcache_jax.parallel.mesh import automatic, is_known, split_axes


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PackedStore:
    """Written once, at the end of prefill; read-only while decoding.

    Some rules of decoding rewrite it (`DecodingRule.rewrites_context`): then it holds generated tokens, too, in any
    order.

    Attributes:
      keys: [batch, lanes, slots, head_dim], rotated at the token's position in the prompt. One lane per KV head, or
        several heads share one.
      values: like `keys`.
      positions: i32 [batch, lanes, slots]. The token's index in prompt and answer; -1 in a free slot.
      offsets: i32 [batch, layers, kv_heads]. First slot of a segment; the last axis is 1 if there is one for all heads,
        each in a lane of its own.
      lengths: i32, like `offsets`. Slots in the segment.
      key_scales: of a store whose keys and values are codes (`kernels.precision`); None otherwise.
      value_scales: like `key_scales`.
      bits: the precision of a store of codes, such as 8 (`kernels.precision`; static); None of a float store.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    offsets: jax.Array
    lengths: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    bits: int | str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def regular(
        cls,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        layers: int,
        room: int,
        first: jax.Array | None = None,
        **codes: Any,
    ) -> "PackedStore":
        """Segments of `room` slots, in every layer the same tokens of a row, in their order.

            keys[b, h]   | layer 0: t0 t1 t2 ... free | layer 1: t0 t1 t2 ... free | ...
                         ^ 0                          ^ room

        Args:
          keys: [batch, kv_heads, regular_slots(layers, room), head_dim], or codes; `regular_pool` makes it from layers.
          values: like `keys`.
          lengths: i32 [batch], tokens of a row.
          layers: of the model.
          room: slots of a layer.
          first: i32 [batch], position of the first token; 0 by default.
          **codes: scales and bits of a store of codes.
        """
        index = jax.lax.iota(jnp.int32, room)[None]
        positions = jnp.where(index < lengths[:, None], index if first is None else first[:, None] + index, -1)
        return cls.by_layer(keys, values, [(positions, lengths, layers)], (room,) * layers, **codes)

    @classmethod
    def latest(
        cls,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        tokens: Sequence[int],
        rooms: Sequence[int],
        slots: int,
        **codes: Any,
    ) -> "PackedStore":
        """Segments of `rooms[layer]` slots, one after another, with the last `tokens[layer]` tokens of each row.

        Args:
          keys: [batch, kv_heads, slots, head_dim], or codes. A row of fewer tokens fills its segments from the front.
          values: like `keys`.
          lengths: i32 [batch], tokens of a row.
          tokens: of every layer, at most its room.
          rooms: of every layer.
          slots: of the pool, at least the sum of the rooms.
          **codes: scales and bits of a store of codes.
        """
        groups = []
        for most in tokens:
            held, index = jnp.minimum(lengths, most), jax.lax.iota(jnp.int32, most)[None]
            groups.append((jnp.where(index < held[:, None], (lengths - held)[:, None] + index, -1), held, 1))
        return cls.by_layer(keys, values, groups, rooms, slots, **codes)

    @classmethod
    def by_layer(
        cls,
        keys: jax.Array,
        values: jax.Array,
        groups: Sequence[tuple[jax.Array, jax.Array, int]],
        rooms: Sequence[int],
        slots: int | None = None,
        **codes: Any,
    ) -> "PackedStore":
        """Segments of `rooms[layer]` slots, one after another; groups of layers hold tokens of their own.

        Args:
          keys: [batch, kv_heads, slots, head_dim], or codes.
          values: like `keys`.
          groups: of the layers, in their order: positions i32 [batch, n], -1 in free slots, how many tokens i32
            [batch], and the number of layers.
          rooms: of every layer, at least its n.
          slots: of the pool; as few as hold the rooms by default.
          **codes: scales and bits of a store of codes.
        """
        (batch, heads, *_), starts, parts, layer = keys.shape, np.cumsum((0, *rooms)), [], 0
        for positions, _, size in groups:
            padded = jnp.pad(positions, ((0, 0), (0, rooms[layer] - positions.shape[1])), constant_values=-1)
            parts.append(jnp.tile(padded, (1, size)))
            layer += size
        slots = slots or whole_tiles(int(starts[-1]))
        parts.append(jnp.full((batch, slots - int(starts[-1])), -1, jnp.int32))
        lengths = [jnp.broadcast_to(count[:, None], (batch, size)) for _, count, size in groups]
        return cls(
            keys=keys,
            values=values,
            positions=jnp.broadcast_to(jnp.concatenate(parts, axis=1)[:, None], (batch, heads, slots)),
            offsets=jnp.broadcast_to(starts[:-1, None].astype(np.int32), (batch, layer, 1)),
            lengths=jnp.concatenate(lengths, axis=1)[..., None],
            **codes,
        )

    def layer(self, layer: jax.Array | int, since: jax.Array | None = None) -> tuple[Store, Segments]:
        """What the attention of a layer reads.

        Args:
          layer: index.
          since: i32 [rows] or [rows, n], the first token that each query sees, by its index in prompt and answer; of a
            layer with a window, whose heads hold the same consecutive tokens. None: all see all. Rows are a multiple of
            the store's.
        """
        _, layers, heads = self.lengths.shape
        share = layers * -(-heads // self.keys.shape[1])  # of a lane
        store = Store(self.keys, self.values, self.key_scales, self.value_scales, self.bits, share)
        offsets, lengths = self.offsets[:, layer], self.lengths[:, layer]
        if since is None:
            return store, Segments(offsets, lengths)
        batch, _, slots = self.positions.shape
        first = self.positions[jax.lax.iota(jnp.int32, batch), 0, jnp.minimum(offsets[:, 0], slots - 1)]
        first, held = (jnp.repeat(x, since.shape[0] // batch) for x in (first, lengths[:, 0]))
        if since.ndim == 2:
            first, held = first[:, None], held[:, None]
        return store, Segments(offsets, lengths, jnp.clip(since - first, 0, held))

    def kept_positions(self, layer: jax.Array | int) -> jax.Array:
        """i32 [batch, kv_heads, n]: positions that a layer keeps, ascending, -1 beyond the kept ones.

        n is the largest number kept in this layer, or, where that is not known (traced, or rows of another process),
        the number of slots of the pool.
        """
        slots = self.positions.shape[2]
        if not (is_known(self.lengths) and is_known(layer)):
            return _kept_positions(self, layer, slots)
        counts = np.asarray(self.lengths).max(axis=(0, 2), initial=1)  # one program for all layers of a store
        return _kept_positions(self, layer, int(counts.max()))[..., : int(counts[layer])]

    def partition_specs(self) -> "PackedStore":
        """Where its arrays lie on the mesh at hand: a `PartitionSpec` for each."""
        batch, lanes, _ = self.positions.shape
        return store_specs(batch, lanes, per_head=self.offsets.shape[2] > 1, bits=self.bits)

    def slot_axes(self) -> "PackedStore":
        """Along which axis of each array its slots lie; -1 where there are none."""
        spans = ((2, 1), (2, 1), None, None) if self.bits is None else PRECISIONS[self.bits].spans
        keys, values, key_scales, value_scales = (span and span[0] for span in spans)
        none: Any = jax.tree.map(lambda _: -1, self)
        return dataclasses.replace(
            none, keys=keys, values=values, positions=2, key_scales=key_scales, value_scales=value_scales
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def store_specs(batch: int, lanes: int, *, per_head: bool, bits: int | str | None) -> PackedStore:
    """`PackedStore.partition_specs` of a store that is yet to be made."""
    of_lanes = lanes_spec(batch, lanes)
    rows, over = of_lanes
    table = PartitionSpec(rows, None, over) if per_head else PartitionSpec(rows)
    scales = (span and of_lanes for span in PRECISIONS[bits].spans[2:]) if bits is not None else (None, None)
    specs: Any = (of_lanes, of_lanes, of_lanes, table, table, *scales, bits)
    return PackedStore(*specs)


def lanes_spec(batch: int, lanes: int) -> PartitionSpec:
    """Where [batch, lanes, ...] lies: rows over the data axes, lanes (or heads) over "model", where they divide."""
    return PartitionSpec(*split_axes(batch, lanes))


def split(buffer: jax.Array) -> jax.Array:
    """Puts [batch, lanes, ...] on the mesh as the ops expect it."""
    spec = lanes_spec(*buffer.shape[:2])
    return buffer if spec == PartitionSpec(None, None) else jax.lax.with_sharding_constraint(buffer, spec)


def regular_pool(x: jax.Array, room: int) -> jax.Array:
    """The buffer of a regular store from [batch, kv_heads, layers, n, head_dim], of which `room` slots a layer."""
    batch, heads, layers, n, head_dim = x.shape
    x = jnp.pad(x[:, :, :, :room], ((0, 0), (0, 0), (0, 0), (0, max(0, room - n)), (0, 0)))
    x = x.reshape(batch, heads, layers * room, head_dim)
    return split(jnp.pad(x, ((0, 0), (0, 0), (0, regular_slots(layers, room) - layers * room), (0, 0))))


@partial(jax.jit, static_argnames="count")
@automatic
def _kept_positions(store: PackedStore, layer: jax.Array | int, count: int) -> jax.Array:
    batch, lanes, slots = store.positions.shape
    heads = max(lanes, store.lengths.shape[2])
    offsets = jnp.broadcast_to(store.offsets[:, layer], (batch, heads))
    lengths = jnp.broadcast_to(store.lengths[:, layer], (batch, heads))
    index = jax.lax.iota(jnp.int32, count)[None, None]
    slot = jnp.minimum(offsets[..., None] + index, slots - 1)
    lane = jax.lax.iota(jnp.int32, heads) * lanes // heads
    positions = store.positions[jax.lax.iota(jnp.int32, batch)[:, None, None], lane[None, :, None], slot]
    last = jnp.iinfo(jnp.int32).max
    positions = jnp.sort(jnp.where(index < lengths[..., None], positions, last), axis=-1)
    return jnp.where(positions < last, positions, -1)
