"""SnapKV (Li et al., arXiv 2404.14469, NeurIPS 2024)."""

from typing import Unpack

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget, Tokens
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import AccumulatedAttention, Score
from vlcache_jax.policies.scores.pooling import pooled
from vlcache_jax.policies.scores.visual_sinks import without_sinks
from vlcache_jax.policies.window import Recent, Window

WINDOW = 32
"""Rows that vote, and recent tokens that are kept, in the authors' code."""


@method("snap_kv", title="SnapKV")
def SnapKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    window: int | None = None,
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
    the budget is not compressed. The authors' code refuses a budget that does not exceed the window; here a window that
    would take more than half of the slots is made smaller, see `Window`. One that is asked for, by `window` or
    `recent`, is kept whole.

    Query-aware, if the question lies in the last rows.

    Args:
      budget: see `Policy.budget`.
      window: rows that vote, and recent tokens that are kept. By default 32, of which no more are kept
        than `Window(32)` allows.
      pool: odd number of neighbours, 1 for none; size of the square with `grid_side`.
      pooling: "mean" or "max".
      grid_side: pool visual tokens on their patch grid instead; see `GridPooled`.
      recent: recent tokens to keep, as in `Policy`; the window by default.
      heads: "each" ranks for every KV head, "shared" once per layer.
      mask_visual_sinks: see `MaskVisualSinks`.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> SnapKV(budget=256).recent, SnapKV(budget=256, window=32).recent
      (Window(count=32), Tokens(count=32))
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="snap_kv",
        budget=budget,
        rows=LastRows(count),
        score=snap_score(pool, pooling, grid_side, recent, heads, mask_visual_sinks),
        recent=recent,
        **options,
    )


def observation_window(window: int | None, recent: Recent | None) -> tuple[int, Recent]:
    """Rows that vote and the recent tokens to keep: 32 rows and `Window(32)` where nothing is asked for."""
    count = WINDOW if window is None else window
    if recent is not None:
        return count, recent
    return count, Window(count) if window is None else Tokens(count)


def unpooled(recent: Recent) -> int | Window:
    """The last tokens that take no part in the pooling: a window of a number of tokens."""
    if isinstance(recent, Tokens):
        return recent.count
    return recent if isinstance(recent, Window) else 0


def snap_score(
    pool: int = 5,
    pooling: str = "mean",
    grid_side: int | None = None,
    recent: Recent = 0.0,
    heads: str = "each",
    mask_visual_sinks: bool = False,
) -> Score:
    """The pooled votes; a window of a fixed number of tokens takes no part in the pooling."""
    score = without_sinks(AccumulatedAttention(heads), mask_visual_sinks)
    return pooled(score, pool, pooling, grid_side, unpooled(recent))
