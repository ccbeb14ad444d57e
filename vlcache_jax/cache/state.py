"""The compressed KV cache: fixed shapes, budgets decided at run time.

The slots of all layers of a row lie in one pool. The sum over layers is known before the prompt is seen, so the pool
has a static size although every prompt splits it differently:

    context.keys[b, h]   | layer 0 ............ free | layer 1 .. free | layer 2 ...... free |  free  |
                         ^ offsets[b, 0] = 0         ^ offsets[b, 1]   ^ offsets[b, 2]
                         <-------------------> lengths[b, 0]

Segments start at multiples of `geometry.ALIGNMENT`, the rows of a TPU tile in bfloat16; of a quantised store at
multiples of its group.

Head-adaptive methods give the KV heads of a layer different numbers of slots. Then several heads share a lane, and
what is known beforehand is the sum over the heads of a lane. KV head h lies in lane h * lanes // kv_heads; with 4 KV
heads in 2 lanes:

    context.keys[b, 0]   | layer 0, head 0 .. | layer 0, head 1 ....... | layer 1, head 0 ... | layer 1, head 1 | ...
    context.keys[b, 1]   | layer 0, head 2 ....... | layer 0, head 3 | layer 1, head 2 .......... | layer 1, ...
                         ^ offsets[b, 0, 2] = 0    ^ offsets[b, 0, 3]
                         <---------------------> lengths[b, 0, 2]

Generated tokens go to the tail:

    tail.keys[b, h]      | layer 0: t0 t1 t2 .......... | layer 1: t0 t1 t2 .......... | ...
                                     <-> tail.length        <-> capacity for each layer
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.files.exporting import exportable
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.parallel.mesh import automatic, is_known


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PackedStore:
    """The kept part of the prompt. Written once, at the end of prefill; read-only while decoding.

    Two rules of the generated tokens rewrite it (`Generated.rewrites_context`): then it holds generated tokens, too,
    in any order.

    Attributes:
      keys: [batch, lanes, slots, head_dim], rotated at the token's position in the prompt. One lane per KV head, or
        several heads share one.
      values: like `keys`.
      positions: i32 [batch, lanes, slots]. The token's index in prompt and answer; -1 in a free slot.
      offsets: i32 [batch, layers, kv_heads]. First slot of a segment; the last axis is 1 if there is one for all heads,
        each in a lane of its own.
      lengths: i32, like `offsets`. Slots in the segment.
      key_scales: of a quantised store, whose keys and values are codes (`kernels.quantisation`); None otherwise.
      value_scales: like `key_scales`.
      value_channels: f32 [batch, layers, kv_heads, head_dim], by which values were divided before they were quantised;
        None if they were not.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    offsets: jax.Array
    lengths: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    value_channels: jax.Array | None = None

    def layer(self, layer: jax.Array | int) -> tuple[Store, Segments]:
        """What the attention of a layer reads."""
        channels = None if self.value_channels is None else self.value_channels[:, layer]
        store = Store(self.keys, self.values, self.key_scales, self.value_scales, channels)
        return store, Segments(self.offsets[:, layer], self.lengths[:, layer])

    @property
    def bits(self) -> int | None:
        """Of a quantised store: 8, 4 or 2."""
        return None if self.key_scales is None else 8 * self.keys.shape[2] // self.positions.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TailStore:
    """The generated tokens that are not in the context.

    Attributes:
      keys: [batch, lanes, slots, head_dim], rotated; slots is layers * capacity, or a little more (`whole_tiles`).
      values: like `keys`.
      length: i32 [batch]. Tokens appended so far, or, with `Recompress`, since the context was last rewritten. All
        rows append at the same slot, in a `RollingWindow` modulo its size, so all must have the same length; `Evict`,
        which has no tail, apart.
      capacity: slots of a layer, here or, with `Evict`, which has no tail, in the context (static).
      rule: what becomes of the generated tokens (static).
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    rule: Any = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@exportable
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


@exportable
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


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """How the budget was shared out.

    Attributes:
      requested: i32 [batch, layers], or [batch, layers, kv_heads] of a head-adaptive method. Slots the allocator gave;
        more than were kept only if a layer had handed on fewer candidates (`candidate_fraction`).
      density: f32 [batch, layers]. Share of attention entries above the threshold (1 where it was not measured); NaN
        in a layer whose scores, or keys and values that are merged, are not finite.
    """

    requested: jax.Array
    density: jax.Array


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KVState:
    """Everything a decode step needs besides the parameters. A pytree of fixed shapes.

    Attributes:
      context: the kept part of the prompt.
      tail: the generated tokens.
      next_position: i32 [batch]. Rotary position of the next token; goes on from the original prompt length.
      allocation: how the budget was shared out.
      finite: bool [batch]. False once a score, a merged key or value, or a logit of the row was NaN or infinite, or the
        row could not be appended to: what it says from there on means nothing.
      more: further parts of the prompt, read like the context: what is kept at a lower precision, say. Most have none.
      observed: what the rule of the generated tokens remembers of the attention; None with most rules.
    """

    context: PackedStore
    tail: TailStore
    next_position: jax.Array
    allocation: Allocation
    finite: jax.Array
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
          where that is not known (traced, or rows of another process), the number of slots of the pool.
        """
        c = self.context
        count = c.positions.shape[2]
        if is_known(c.lengths):
            count = int(np.max(np.asarray(c.lengths)[:, layer], initial=1))
        return _kept_positions(c, layer, count)


@partial(jax.jit, static_argnames="count")
@automatic
def _kept_positions(c: PackedStore, layer: jax.Array | int, count: int) -> jax.Array:
    batch, lanes, slots = c.positions.shape
    heads = max(lanes, c.lengths.shape[2])
    offsets = jnp.broadcast_to(c.offsets[:, layer], (batch, heads))
    lengths = jnp.broadcast_to(c.lengths[:, layer], (batch, heads))
    index = jax.lax.iota(jnp.int32, count)[None, None]
    slot = jnp.minimum(offsets[..., None] + index, slots - 1)
    lane = jax.lax.iota(jnp.int32, heads) * lanes // heads
    positions = c.positions[jax.lax.iota(jnp.int32, batch)[:, None, None], lane[None, :, None], slot]
    last = jnp.iinfo(jnp.int32).max
    positions = jnp.sort(jnp.where(index < lengths[..., None], positions, last), axis=-1)
    return jnp.where(positions < last, positions, -1)
