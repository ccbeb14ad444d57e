"""The compressed KV cache: fixed shapes, budgets decided at run time.

The slots of all layers of a row lie in one pool. The sum over layers is known before the prompt is seen, so the pool
has a static size although every prompt splits it differently:

    context.keys[b, h]   | layer 0 ............ free | layer 1 .. free | layer 2 ...... free |  free  |
                         ^ offsets[b, 0] = 0         ^ offsets[b, 1]   ^ offsets[b, 2]
                         <-------------------> lengths[b, 0]

Segments start at multiples of `ALIGNMENT`, the rows of a TPU tile in bfloat16. Generated tokens go to the tail:

    tail.keys[b, h]      | layer 0: t0 t1 t2 .......... | layer 1: t0 t1 t2 .......... | ...
                                     <-> tail.length        <-> capacity for each layer
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.kernels.decode_attention import Segments, Store

if TYPE_CHECKING:
    from vlcache_jax.policies.generated import Generated

ALIGNMENT = 16
"""Segments start at multiples of this many slots."""


def align(count: jax.Array | int) -> jax.Array | int:
    """Rounds up to a multiple of `ALIGNMENT`."""
    return (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def whole_tiles(slots: int) -> int:
    """Rounds the slots of a large store up to a multiple of 128.

    The TPU kernel needs it for head sizes below 128, whose tiles have the slots as their last axis. Small stores, where
    it would cost more than a sixteenth, are left alone; there the kernel's place is taken by plain XLA.
    """
    return -(-slots // 128) * 128 if slots >= 2048 else slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PackedStore:
    """The kept part of the prompt. Written once, at the end of prefill; read-only while decoding.

    Two rules of the generated tokens rewrite it (`Generated.rewrites_context`): then it holds generated tokens, too,
    in any order.

    Attributes:
      keys: [batch, lanes, slots, head_dim], rotated at the token's position in the prompt. One lane per KV head.
      values: like `keys`.
      positions: i32 [batch, lanes, slots]. The token's index in prompt and answer; -1 in a free slot.
      offsets: i32 [batch, layers, kv_heads]. First slot of a segment; the last axis is 1 if all heads share it.
      lengths: i32, like `offsets`. Slots in the segment.
      key_scales: of a quantised store, whose keys and values are codes (`kernels.quantisation`); None otherwise.
      value_scales: like `key_scales`.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    offsets: jax.Array
    lengths: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def layer(self, layer: jax.Array | int) -> tuple[Store, Segments]:
        """What the attention of a layer reads."""
        store = Store(self.keys, self.values, self.key_scales, self.value_scales)
        return store, Segments(self.offsets[:, layer], self.lengths[:, layer])

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TailStore:
    """The generated tokens that are not in the context.

    Attributes:
      keys: [batch, lanes, slots, head_dim], rotated; slots is layers * capacity, or a little more (`whole_tiles`).
      values: like `keys`.
      length: i32 [batch]. Tokens appended so far, or, with `Recompress`, since the context was last rewritten. All
        rows append at the same slot, the largest length; in a `RollingWindow`, modulo its size.
      capacity: slots of a layer, here or, with `Evict`, which has no tail, in the context (static).
      rule: what becomes of the generated tokens (static).
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    rule: "Generated" = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotWeights:
    """What `Evict` knows of the tokens in the context.

    Attributes:
      scores: f32 [batch, lanes, slots]. Attention received by the token of each slot.
      sizes: i32 [batch, layers]. Tokens a layer holds between two steps.
    """

    scores: jax.Array
    sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class RecentQueries:
    """What `Recompress` knows of the latest steps: a ring of `rows` of them for each layer.

    Attributes:
      queries: [batch, heads, layers * rows, head_dim], rotated.
      lse: f32 [batch, heads, layers * rows]. The log-sum-exp of their scaled logits over all that they saw.
    """

    queries: jax.Array
    lse: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """How the budget was shared out.

    Attributes:
      requested: i32 [batch, layers]. Slots the allocator gave; more than were kept only if a layer had handed on fewer
        candidates (`candidate_fraction`).
      density: f32 [batch, layers]. Share of attention entries above the threshold (1 where it was not measured).
    """

    requested: jax.Array
    density: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KVState:
    """Everything a decode step needs besides the parameters. A pytree of fixed shapes.

    Attributes:
      context: the kept part of the prompt.
      tail: the generated tokens.
      next_position: i32 [batch]. Rotary position of the next token; goes on from the original prompt length.
      allocation: how the budget was shared out.
      more: further parts of the prompt, read like the context: what is kept at a lower precision, say. Most have none.
      observed: what the rule of the generated tokens remembers of the attention; None with most rules.
    """

    context: PackedStore
    tail: TailStore
    next_position: jax.Array
    allocation: Allocation
    more: tuple[PackedStore, ...] = ()
    observed: SlotWeights | RecentQueries | None = None

    @property
    def stores(self) -> tuple[PackedStore, ...]:
        """All read-only parts: the context first."""
        return (self.context, *self.more)

    def kept_positions(self, layer: int) -> jax.Array:
        """Positions that a layer keeps, for every row and KV head; in the prompt, or in the answer that follows it.

        Args:
          layer: 0 <= layer < layers.

        Returns:
          i32 [batch, kv_heads, n], ascending, -1 beyond the kept ones. n is the largest number kept in this layer, or,
          when traced, the number of slots of the pool.
        """
        c = self.context
        batch, lanes, slots = c.positions.shape
        offsets = jnp.broadcast_to(c.offsets[:, layer], (batch, lanes))
        lengths = jnp.broadcast_to(c.lengths[:, layer], (batch, lanes))
        count = slots
        if not isinstance(lengths, jax.core.Tracer):
            count = int(np.max(np.asarray(lengths), initial=1))
        index = jnp.arange(count)
        slot = jnp.minimum(offsets[..., None] + index, slots - 1)
        positions = jnp.take_along_axis(c.positions, slot, axis=2)
        last = jnp.iinfo(jnp.int32).max
        positions = jnp.sort(jnp.where(index < lengths[..., None], positions, last), axis=-1)
        return jnp.where(positions < last, positions, -1)
