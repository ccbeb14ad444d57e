"""TOVA, token omission via attention (Oren et al., arXiv 2401.06104, EMNLP 2024), one-shot."""

from vlcache_jax.budgets import Budget
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.rows import LastRow
from vlcache_jax.policies.scores import AccumulatedAttention


def TOVA(budget: Budget = 0.1, *, candidate_fraction: float = 1.0, bits: int | None = None) -> Policy:
    """The tokens that the last row attends to, one selection for all heads of a layer, the same number in every layer.

        score_j = A[n - 1, j], averaged over all query heads of the layer

    Choices. There is no recent window, but the last token is always kept, as in kvpress (in the authors' code even it
    can go). One-shot: the original applies the same rule after every decode step as well.

    Query-aware: the last row ends the question.

    Args:
      budget: see `Policy.budget`.
      candidate_fraction: see `Policy`.
      bits: see `Policy`.

    Returns:
      The policy.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> TOVA(budget=0.2).score
      AccumulatedAttention(heads='shared', normalised=False)
    """
    return Policy(
        name="tova",
        budget=budget,
        rows=LastRow(),
        score=AccumulatedAttention("shared"),
        recent=0.0,
        candidate_fraction=candidate_fraction,
        bits=bits,
    )
