"""SnapKV (Li et al., arXiv 2404.14469, NeurIPS 2024)."""

from typing import Unpack

from vlcache_jax.budgets import Budget, Tokens
from vlcache_jax.policies.base import Options, Policy
from vlcache_jax.policies.method import method
from vlcache_jax.policies.pooling import pooled
from vlcache_jax.policies.rows import LastRows
from vlcache_jax.policies.scores import AccumulatedAttention, Score
from vlcache_jax.policies.visual_sinks import without_sinks
from vlcache_jax.selection import Recent


@method
def SnapKV(
    budget: Budget = 0.1,
    *,
    window: int = 32,
    pool: int = 5,
    pooling: str = "mean",
    grid_side: int | None = None,
    recent: Recent | None = None,
    heads: str = "each",
    mask_visual_sinks: bool = False,
    **options: Unpack[Options],
) -> Policy:
    """Votes of the last rows, pooled over neighbours; the same number of tokens in every layer and head.

        vote_j  = sum over the last `window` rows q of A[q, j], averaged over the query heads of a KV head
        score_j = mean (or maximum) of vote over the `pool` positions around j, for j before the window

    The window itself is always kept. Defaults are those of the authors' code (window 32, 5 neighbours, mean); their
    LongBench runs use 7 neighbours and the maximum.

    Choices. The authors' code repeats the KV heads to one for each query head; here votes are averaged over the group,
    then pooled (as in KVCache-Factory; kvpress pools first, which differs for the maximum only). A prompt within
    the budget is not compressed. A layer with fewer slots than the window keeps its latest tokens: for short prompts
    or small fractions give `recent=0.1`, which spends a tenth of the slots on recent tokens and ranks the others.

    Query-aware, if the question lies in the last rows.

    Args:
      budget: see `Policy.budget`.
      window: rows that vote, and recent tokens that are kept.
      pool: odd number of neighbours, 1 for none; size of the square with `grid_side`.
      pooling: "mean" or "max".
      grid_side: pool visual tokens on their patch grid instead; see `GridPooled`.
      recent: recent tokens to keep, a fraction of the slots or `Tokens(n)`; the window by default.
      heads: "each" ranks for every KV head, "shared" once per layer.
      mask_visual_sinks: see `MaskVisualSinks`.
      **options: see `Options`.

    Returns:
      The policy.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> SnapKV(budget=256).recent
      Tokens(count=32)
    """
    rows = LastRows(window)
    recent = Tokens(window) if recent is None else recent
    return Policy(
        name="snap_kv",
        budget=budget,
        rows=rows,
        score=snap_score(pool, pooling, grid_side, recent, heads, mask_visual_sinks),
        recent=recent,
        **options,
    )


def snap_score(
    pool: int = 5,
    pooling: str = "mean",
    grid_side: int | None = None,
    recent: Recent = 0.0,
    heads: str = "each",
    mask_visual_sinks: bool = False,
) -> Score:
    """The pooled votes; a window of a fixed number of tokens takes no part in the pooling."""
    skip = recent.count if isinstance(recent, Tokens) else 0
    return pooled(without_sinks(AccumulatedAttention(heads), mask_visual_sinks), pool, pooling, grid_side, skip)
