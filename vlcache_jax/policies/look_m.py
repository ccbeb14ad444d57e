"""LOOK-M's selection (Wan et al., arXiv 2406.18139, Findings of EMNLP 2024); without merging."""

from vlcache_jax.budgets import Budget
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.rows import AllRows
from vlcache_jax.policies.scores import AccumulatedAttention


def LookM(
    budget: Budget = 0.2, *, recent: float = 0.5, candidate_fraction: float = 1.0, bits: int | None = None
) -> Policy:
    """Text first: the recent tokens, then text, then the visual tokens with the most attention.

        S_j = sum over all rows q of A[q, j], averaged over the query heads of a KV head
        S_j = S_j + max_i S_i   for text tokens j: they all rank before the visual ones

    The published setting keeps 10 % important and 10 % recent tokens: a budget of 0.2, half of it recent.

    Choices. Merging of the evicted tokens is not part of this policy. Ranks are compared by kind and then by score, not
    by adding a large number, so nothing is lost to rounding. The budget is a promise here, as in the paper: if
    the text alone exceeds it, text is ranked by score. The authors' code keeps all text then, whatever the budget;
    where the text fits, the two select the same. Scores of grouped query heads are averaged (the original has no
    groups).

    Its rows are the whole prompt: mostly query-agnostic.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens.
      candidate_fraction: see `Policy`.
      bits: see `Policy`.

    Returns:
      The policy.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> LookM().protect
      'text'
    """
    return Policy(
        name="look_m",
        budget=budget,
        rows=AllRows(),
        score=AccumulatedAttention(),
        recent=recent,
        protect="text",
        candidate_fraction=candidate_fraction,
        bits=bits,
    )
