"""StreamingLLM (Xiao et al., arXiv 2309.17453, ICLR 2024)."""

from typing import Unpack

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.decoding.evict import Evict
from vlcache_jax.policies.decoding.rule import DecodingRule, rule_by_name
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy, StoreOptions
from vlcache_jax.policies.scores.attention import Recency


@method("streaming_llm", title="StreamingLLM", query_agnostic=True)
def StreamingLLM(
    budget: Budget = DEFAULT_BUDGET,
    *,
    sinks: int = 4,
    decoding: str | DecodingRule = "append",
    **options: Unpack[StoreOptions],
) -> Policy:
    """The first tokens (attention sinks) and the latest ones, in every layer and head; nothing is scored.

        kept = {0 .. sinks - 1} and {n - (slots - sinks) .. n - 1}

    Choices. Positions are not re-assigned: kept keys keep the rotary position they were computed with, as in kvpress;
    the paper rotates keys by their place in the cache, which matters only beyond the length a model was trained for.
    By default this is the prompt's compression alone: generated tokens are appended and never evicted.
    `decoding="window"` keeps the latest 256 of them (`RollingWindow`), besides what was kept of the prompt;
    `decoding="evict"` is the original, whose window of recent tokens moves on over prompt and answer (`Evict`).

    Query-agnostic: what is kept does not depend on the question's content. A lower bound that any score must beat when
    the answer lies in the image.

    Args:
      budget: see `Policy.budget`.
      sinks: first tokens to keep; the paper uses 4.
      **options: see `StoreOptions`.
      decoding: what becomes of generated tokens: "append", "evict", "window:TOKENS", "recompress:TOKENS" or a rule, see
        `Policy.decoding`.

    Raises:
      PolicyError: an option out of range, or sinks that leave no room for the last token.

    Example:
      >>> StreamingLLM(budget=256).sinks
      4
    """
    return Policy(
        name="streaming_llm",
        budget=budget,
        score=Recency(),
        recent=1.0,
        sinks=sinks,
        **options,
        decoding=rule_by_name(decoding, evict=Evict(weigh="last")),
    )
