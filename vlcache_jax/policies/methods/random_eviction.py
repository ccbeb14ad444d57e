"""Keeping tokens at random."""

from typing import Unpack

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import RandomScore


@method("random", title="Random", query_agnostic=True)
def RandomEviction(
    budget: Budget = DEFAULT_BUDGET, *, recent: float = 0.1, seed: int = 0, **options: Unpack[Options]
) -> Policy:
    """Keeps random tokens, the same number in every layer, besides the recent ones: what a score must beat.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of each layer's slots for its most recent tokens.
      seed: of the random scores; they depend on layer, KV head and position only.
      **options: see `Options`.
    """
    return Policy(name="random", budget=budget, score=RandomScore(seed), recent=recent, **options)
