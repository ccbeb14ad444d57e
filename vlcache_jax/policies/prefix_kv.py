"""PrefixKV (Wang et al., arXiv 2412.03409, NeurIPS 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.budgets import Budget, SlotBudget
from vlcache_jax.policies.allocate import Allocate
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.rows import AllRows
from vlcache_jax.policies.scores import AccumulatedAttention, LayerInputs


@dataclasses.dataclass(frozen=True)
class EqualMass(Allocate):
    """Every layer keeps the shortest prefix of its ranking that holds the same share p of the layer's score.

    Let c[l, k] be the share held by the k best tokens of layer l. A token of rank k + 1 belongs to the prefix of mass p
    as long as c[l, k] < p. So the p at which all prefixes add up to the budget need not be searched for: the budget
    goes to the smallest c[l, k] of all layers, ties to the lower layer, and is met exactly. The paper finds p by
    bisection. Scores must not be negative.
    """

    def measure(self, inputs: LayerInputs, scores: jax.Array) -> jax.Array:
        """f32 [batch, length]: the share of the better tokens, for each rank; infinite beyond the prompt."""
        valid = inputs.valid
        mass = jnp.where(valid, jnp.mean(scores.astype(jnp.float32), axis=1), 0)
        ranked = -jnp.sort(-mass, axis=1)
        better = jnp.cumsum(ranked, axis=1) - ranked
        return jnp.where(valid, better / jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), 1e-30), jnp.inf)

    def slots(self, measured: jax.Array, lengths: jax.Array, budget: SlotBudget) -> jax.Array:
        """See `Allocate.slots`."""
        rows, layers, length = measured.shape
        order = jnp.argsort(measured.reshape(rows, -1), axis=1, stable=True)
        taken = jnp.arange(layers * length) < jnp.asarray(budget.total(lengths))[:, None]
        count = jax.vmap(lambda o, t: jnp.zeros((layers,), jnp.int32).at[o // length].add(t))
        return count(order, taken.astype(jnp.int32))


def PrefixKV(
    budget: Budget = 0.1,
    *,
    sinks: int = 4,
    recent: float = 0.0,
    candidate_fraction: float = 1.0,
    bits: int | None = None,
) -> Policy:
    """Layer budgets that hold the same share of every layer's accumulated attention; see `EqualMass`.

        score_j = sum over all rows q of A[q, j], averaged over all query heads: one selection for the layer

    The first 4 tokens and the last one are always kept, as in the authors' code.

    Choices. The shares are measured on the prompt itself; the authors mostly use a profile measured once on about ten
    samples. The forced tokens count within a layer's slots. Generated tokens are never evicted (the authors drop
    one a step).

    Its rows are the whole prompt: mostly query-agnostic.

    Args:
      budget: see `Policy.budget`.
      sinks: first tokens to keep.
      recent: fraction of a layer's slots for its most recent tokens; the last token is kept in any case.
      candidate_fraction: see `Policy`.
      bits: see `Policy`.

    Returns:
      The policy.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> PrefixKV().allocate
      EqualMass()
    """
    return Policy(
        name="prefix_kv",
        budget=budget,
        rows=AllRows(),
        score=AccumulatedAttention("shared"),
        allocate=EqualMass(),
        recent=recent,
        sinks=sinks,
        candidate_fraction=candidate_fraction,
        bits=bits,
    )
