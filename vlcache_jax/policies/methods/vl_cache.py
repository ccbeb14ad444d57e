"""VL-Cache (Tu, Vashchilenko, Lu, Xu: arXiv 2410.23317, ICLR 2025)."""

from typing import Unpack

from vlcache_jax.policies.allocate.uniform import SparsityAware
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import PostVision, Rows
from vlcache_jax.policies.scores.attention import AccumulatedAttention
from vlcache_jax.policies.scores.pooling import pooled
from vlcache_jax.policies.scores.visual_sinks import without_sinks
from vlcache_jax.policies.window import AverageShare, Recent


@method("vl_cache", title="VL-Cache")
def VLCache(
    budget: Budget = DEFAULT_BUDGET,
    *,
    threshold: float = 0.01,
    recent: Recent | None = None,
    rows: Rows | None = None,
    heads: str = "each",
    total: str = "exact",
    pool: int = 1,
    pooling: str = "mean",
    grid_side: int | None = None,
    mask_visual_sinks: bool = False,
    **options: Unpack[Options],
) -> Policy:
    """Layer budgets from the sparsity of post-vision attention, token scores from the same attention.

    Over the rows P after the last visual token (section 3.2), with attention A of a layer and query head:

        density = #{A[q, j] >= threshold * max_j A[q, j]} / #{(q, j): q in P, j <= q}, averaged over heads
        score_j = sum over q in P of A[q, j], averaged over the query heads of a KV head

    Layers share budget * layers * length slots in proportion to their density (Algorithm 1; see
    `vlcache_jax.layer_budgets`); in each, `recent` of the slots go to the latest tokens and the others to the best
    scores. Kept keys and values stay as computed; generated tokens are appended and never evicted.

    Args:
      budget: fraction of the full cache to keep, in (0, 1]; or tokens or bytes, see `Policy.budget`.
      threshold: relative threshold p of equation 1.
      recent: most recent tokens to keep, as in `Policy`; a tenth of each layer's slots by default (section 5), with
        total="effivlm" of the average layer's.
      rows: scoring rows; the rows after the last visual token by default. The paper's speed test uses `LastRows(50)`.
      heads: "each" ranks for every KV head, "shared" once per layer. The paper does not say which.
      total: "exact" makes the layers add up to the budget; "paper" clips without sharing again; "effivlm" is
        EffiVLM-Bench's rule, see `SparsityAware`, whose code the published figures of other groups come from.
      pool: odd number of neighbours over which scores are pooled; 1, for none, is the paper's.
      pooling: "mean" or "max".
      grid_side: pool visual tokens over pool x pool patches of their grid instead; see `GridPooled`.
      mask_visual_sinks: see `MaskVisualSinks`; not the paper's.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> VLCache(budget=0.1).name
      'vl_cache'
    """
    return Policy(
        name="vl_cache",
        budget=budget,
        rows=PostVision() if rows is None else rows,
        score=pooled(without_sinks(AccumulatedAttention(heads), mask_visual_sinks), pool, pooling, grid_side),
        allocate=SparsityAware(threshold, total),
        recent=(AverageShare(0.1) if total == "effivlm" else 0.1) if recent is None else recent,
        **options,
    )
