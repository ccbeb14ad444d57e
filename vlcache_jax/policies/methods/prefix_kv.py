"""PrefixKV (Wang et al., arXiv 2412.03409, NeurIPS 2025)."""

from typing import Unpack

from vlcache_jax.policies.allocate.equal_mass import EqualMass
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import AllRows
from vlcache_jax.policies.scores.attention import AccumulatedAttention


@method("prefix_kv", title="PrefixKV", query_agnostic=True)
def PrefixKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    sinks: int = 4,
    recent: float = 0.0,
    **options: Unpack[Options],
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
      **options: see `Options`.

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
        **options,
    )
