"""H2O, heavy-hitter oracle (Zhang et al., arXiv 2306.14048, NeurIPS 2023)."""

from typing import Unpack

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.decoding.evict import Evict
from vlcache_jax.policies.decoding.rule import DecodingRule, rule_by_name
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy, StoreOptions
from vlcache_jax.policies.rows.spans import AllRows
from vlcache_jax.policies.scores.attention import AccumulatedAttention


@method("h2o", title="H2O", query_agnostic=True)
def H2O(
    budget: Budget = DEFAULT_BUDGET,
    *,
    recent: float = 0.5,
    normalised: bool = False,
    decoding: str | DecodingRule = "append",
    **options: Unpack[StoreOptions],
) -> Policy:
    """The tokens with the most attention from all rows of the prompt, and the recent ones; the same for every layer.

        score_j = sum over q >= j of A[q, j], averaged over the query heads of a KV head

    The default halves the slots between heavy hitters and recent tokens, as the authors' code does
    (heavy_ratio = recent_ratio).

    Choices. By default one-shot: the prompt is compressed once and generated tokens are never evicted.
    `decoding="evict"` is the original: generated tokens take part, and every step adds its attention to the scores and
    gives up the weakest token that is not among the recent ones (`Evict`). The original has one KV head for each query
    head; with grouped queries scores are averaged over the group (the default of KVCache-Factory). The plain sum
    favours early tokens, which more rows can see: `normalised=True` divides by the number of those rows, n - j
    (kvpress, ObservedAttention; ZipCache).

    Its rows are the whole prompt, of which the question is a small part: mostly query-agnostic.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens. VL-Cache's comparison uses 0.1.
      normalised: divide a token's score by the number of rows that see it.
      **options: see `StoreOptions`.
      decoding: what becomes of generated tokens: "append", "evict", "window:TOKENS", "recompress:TOKENS" or a rule, see
        `Policy.decoding`.

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
        **options,
        decoding=rule_by_name(decoding, evict=Evict(weigh="sum")),
    )
