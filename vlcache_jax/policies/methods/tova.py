"""TOVA, token omission via attention (Oren et al., arXiv 2401.06104, EMNLP 2024)."""

from typing import Unpack

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.decoding.evict import Evict
from vlcache_jax.policies.decoding.rule import DecodingRule, rule_by_name
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy, StoreOptions
from vlcache_jax.policies.rows.spans import LastRow
from vlcache_jax.policies.scores.attention import AccumulatedAttention


@method("tova", title="TOVA")
def TOVA(
    budget: Budget = DEFAULT_BUDGET,
    *,
    decoding: str | DecodingRule = "append",
    **options: Unpack[StoreOptions],
) -> Policy:
    """The tokens that the last row attends to, one selection for all heads of a layer, the same number in every layer.

        score_j = A[n - 1, j], averaged over all query heads of the layer

    Choices. There is no recent window, but the last token is always kept, as in kvpress (in the authors' code even it
    can go). By default one-shot; `decoding="evict"` applies the same rule after every decode step as the original does,
    to prompt and generated tokens alike, except that the newest token stays (see `Evict`).

    Query-aware: the last row ends the question.

    Args:
      budget: see `Policy.budget`.
      **options: see `StoreOptions`.
      decoding: what becomes of generated tokens: "append", "evict", "window:TOKENS", "recompress:TOKENS" or a rule, see
        `Policy.decoding`.

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
        **options,
        decoding=rule_by_name(decoding, evict=Evict(weigh="last", heads="shared")),
    )
