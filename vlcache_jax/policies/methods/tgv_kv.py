"""TGV-KV, text-grounded eviction (Liu et al., arXiv 2606.03075, ICML 2026)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import AccumulatedAttention, LayerInputs, Score
from vlcache_jax.policies.scores.row_blocks import fold_rows, softmax_of_rows
from vlcache_jax.policies.shares import SlotBudget, share_slots


@dataclasses.dataclass(frozen=True)
class TextWeighted(Score):
    """Attention of the text rows, each weighted by how much the other text rows attend to it.

    With A a layer's attention, averaged over all query heads, and T the policy's rows:

        w_i     = sum over q in T of A[q, i] / #{q in T: q sees i},   for i in T
        score_j = sum over i in T of w_i A[i, j]
    """

    is_mass = True

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        received = AccumulatedAttention("shared")(inputs)[:, 0]
        place = jax.lax.iota(jnp.int32, received.shape[1])[None]
        first = inputs.mask.first()  # row that sees a column
        first = place if first is None else first
        seen = jnp.minimum(inputs.lengths[:, None] - first, inputs.rows[:, None])
        weight = received / jnp.maximum(seen, 1).astype(jnp.float32)

        def step(total: jax.Array, row: jax.Array, chosen: jax.Array, logits: jax.Array) -> jax.Array:
            weights = jnp.where(chosen, jnp.take_along_axis(weight, row, axis=1), 0)
            return total + jnp.mean(softmax_of_rows(logits, weights), axis=1)

        return fold_rows(inputs, step, jnp.zeros(received.shape, jnp.float32))[:, None]


@dataclasses.dataclass(frozen=True)
class TextVisionMass(Allocate):
    """Slots in proportion to the attention that the policy's rows give to visual tokens, averaged over query heads.

    A layer has `lowest` slots at least and the prompt's length at most; what a bound takes from one is shared among the
    others, so that they add up to the budget (`share_slots`). A prompt without visual tokens has equal layers.
    """

    lowest: int = 1

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """f32 [batch]."""
        received = AccumulatedAttention("shared")(inputs)[:, 0]
        visual = inputs.vision_mask & inputs.valid
        # Without visual tokens not the sum over all, which is the same for all layers but for rounding.
        return jnp.where(jnp.any(visual, axis=1), jnp.sum(jnp.where(visual, received, 0), axis=1), 1)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        least = jnp.minimum(self.lowest, lengths)
        return jax.vmap(share_slots)(measured, jnp.asarray(budget.total(lengths)), least, lengths)


@method("tgv_kv", title="TGV-KV")
def TGVKV(budget: Budget = DEFAULT_BUDGET, *, sinks: int = 4, **options: Unpack[Options]) -> Policy:
    """Text first, then the visual tokens that the important text attends to; layers by what text gives to vision.

    See `TextWeighted` for the ranking (the paper's text-weighted ranking) and `TextVisionMass` for the layers (its
    text-vision budgeting). Text ranks before visual tokens (its text-prioritised retention); the first 4 tokens and the
    last one are always kept. One ranking for all heads of a layer.

    Choices. Layers whose share exceeds the prompt, or falls below the tokens that are always kept, are held there and
    the rest is shared again, so that the budget is met. Text that does not fit is ranked as visual tokens are.

    Query-aware: its rows are those after the last visual token.

    Args:
      budget: see `Policy.budget`.
      sinks: first tokens, always kept.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> TGVKV().protect
      'text'
    """
    return Policy(
        name="tgv_kv",
        budget=budget,
        score=TextWeighted(),
        allocate=TextVisionMass(sinks + 1),
        recent=0.0,
        sinks=sinks,
        protect="text",
        **options,
    )
