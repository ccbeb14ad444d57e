"""H2O, heavy-hitter oracle (Zhang et al., arXiv 2306.14048, NeurIPS 2023), one-shot."""

from vlcache_jax.budgets import Budget
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.rows import AllRows
from vlcache_jax.policies.scores import AccumulatedAttention


def H2O(
    budget: Budget = 0.1,
    *,
    recent: float = 0.5,
    normalised: bool = False,
    candidate_fraction: float = 1.0,
    bits: int | None = None,
) -> Policy:
    """The tokens with the most attention from all rows of the prompt, and the recent ones; the same for every layer.

        score_j = sum over q >= j of A[q, j], averaged over the query heads of a KV head

    The default halves the slots between heavy hitters and recent tokens, as the authors' code does
    (heavy_ratio = recent_ratio).

    Choices. One-shot: the prompt is compressed once and generated tokens are never evicted; the original also evicts
    while it decodes. The original has one KV head for each query head; with grouped queries scores are averaged over
    the group (the default of KVCache-Factory). The plain sum favours early tokens, which more rows can see:
    `normalised=True` divides by the number of those rows, n - j (kvpress, ObservedAttention; ZipCache).

    Its rows are the whole prompt, of which the question is a small part: mostly query-agnostic.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens. VL-Cache's comparison uses 0.1.
      normalised: divide a token's score by the number of rows that see it.
      candidate_fraction: see `Policy`.
      bits: see `Policy`.

    Returns:
      The policy.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> H2O(budget=0.2).recent
      0.5
    """
    return Policy(
        name="h2o",
        budget=budget,
        rows=AllRows(),
        score=AccumulatedAttention(normalised=normalised),
        recent=recent,
        candidate_fraction=candidate_fraction,
        bits=bits,
    )
