"""KVzip (Kim et al., arXiv 2505.23416, NeurIPS 2025): what is needed to say the prompt again."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.policies.allocate.uniform import Allocate
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import Repetition
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.policies.shares import SlotBudget
from vlcache_jax.policies.window import forced


@dataclasses.dataclass(frozen=True)
class LargestAttention(Score):
    """The largest attention that any of the policy's rows gives a token, in any query head of the KV head."""

    needs_maximum = True
    is_mass = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        statistics = inputs.statistics
        assert statistics is not None
        assert statistics.column_maximum is not None
        found = statistics.column_maximum + 0 * statistics.sums  # a maximum may pass over what is no number
        batch, heads, length = found.shape
        kv_heads = inputs.key.shape[2]
        return jnp.max(found.reshape(batch, kv_heads, heads // kv_heads, length), axis=2)


@dataclasses.dataclass(frozen=True)
class BestOfAll(Allocate):
    """The best scores of all layers and of all KV heads of a lane, wherever they are.

    The last token and the first `sinks` ones of every layer and head are among them, so that none is without. Ties go
    to the lower layer, then head, then position.
    """

    sinks: int = 0
    per_head = True

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> Any:
        """The scores, f32 [batch, kv_heads, length], and how many tokens there are."""
        batch, length, kv_heads, _ = inputs.key.shape
        return jnp.broadcast_to(scores.astype(jnp.float32), (batch, kv_heads, length)), inputs.lengths

    def slots(self, measured: Any, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        scores, held = measured
        batch, layers, kv_heads, length = scores.shape
        group = kv_heads // budget.lanes
        total = jnp.asarray(budget.total(lengths))
        latest, first = forced(total // layers, 0.0, self.sinks)
        place = jax.lax.iota(jnp.int32, length)[None, None]
        kept = (place < first[:, None, None]) | (place >= (held - latest[:, None])[..., None])
        priority = jnp.where(kept[:, :, None], jnp.inf, jnp.nan_to_num(scores))
        priority = jnp.where((place < held[..., None])[:, :, None], priority, -jnp.inf)
        # [batch, lanes, layers, group, length]
        priority = jnp.moveaxis(priority.reshape(batch, layers, budget.lanes, group, length), 2, 1)
        best = largest(priority.reshape(batch, budget.lanes, -1), (group * total)[:, None, None])
        found = jnp.sum(best.reshape(priority.shape), axis=-1, dtype=jnp.int32)
        return jnp.moveaxis(found, 1, 2).reshape(batch, layers, kv_heads)


@method("kv_zip", title="KVzip", query_agnostic=True)
def KVzip(budget: Budget = DEFAULT_BUDGET, *, sinks: int = 4, lanes: int = 1, **options: Unpack[Options]) -> Policy:
    """The tokens that the model looks at while it says the prompt again; the best of all layers and heads.

        score_j = max over the rows q of the repetition, and the query heads of a KV head, of A[q, j]

    Prefill has every prompt said twice, with its images, in one pass over twice the tokens; what is kept, and the
    logits, are of the first time. So it takes about 2 times the projections of a prefill, 4 times its attention, and
    prompts of at most half the model's positions.

    Choices. The authors put an instruction between ("Repeat the previous context exactly."), which needs a tokenizer;
    here the repetition follows at once. They repeat prompts of more than 2,048 tokens in parts of as many, each of
    which attends to its own part, itself and the sinks; here the rows of the repetition attend to all. The last token
    is always kept.

    Query-agnostic: a question in the prompt is a part of what is said again.

    Args:
      budget: see `Policy.budget`; a number of tokens is of a layer and KV head on average.
      sinks: first tokens, kept in every layer and head.
      lanes: groups of KV heads; slots are shared within a group only. 1: all heads of all layers. See `Policy.lanes`.
      **options: see `Options`. `candidate_fraction` bounds the slots of a head, too.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> KVzip().repeats
      True
    """
    return Policy(
        name="kv_zip",
        budget=budget,
        rows=Repetition(),
        score=LargestAttention(),
        allocate=BestOfAll(sinks),
        recent=0.0,
        sinks=sinks,
        lanes=lanes,
        **options,
    )
