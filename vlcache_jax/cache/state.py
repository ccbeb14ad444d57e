"""The compressed KV cache of running answers: fixed shapes, budgets decided at run time.

What was kept of the prompt is a `PackedStore` (`cache.store`), what was generated a `TailStore` (`cache.tail`).
"""

import dataclasses
from typing import Any

import jax

from vlcache_jax.cache.store import PackedStore
from vlcache_jax.cache.tail import TailStore
from vlcache_jax.files.exporting import exportable


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
      next_position: i32 [batch]. Rotary position of the next token; the model says where an answer begins.
      next_index: i32 [batch]. How many tokens there were, kept or not: what positions in stores count.
      allocation: how the budget was shared out.
      finite: bool [batch]. False once a score, a merged key or value, or a logit of the row was NaN or infinite, or the
        row could not be appended to: what it says from there on means nothing.
      decoding: the rule that says what becomes of generated tokens, a `policies.decoding.rule.DecodingRule` (static).
      more: further parts of the prompt, read like the context: what is kept at a lower precision, say. Most have none.
      observed: what the rule remembers of the attention, a pytree of its own; None with most rules.
    """

    context: PackedStore
    tail: TailStore
    next_position: jax.Array
    next_index: jax.Array
    allocation: Allocation
    finite: jax.Array
    decoding: Any = dataclasses.field(metadata={"static": True})
    more: tuple[PackedStore, ...] = ()
    observed: Any = None

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
        return self.context.kept_positions(layer)
