"""Ranked bits: one budget in bytes, spent on how many tokens are kept and on how many bits each of them gets."""

import dataclasses

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.budget import Budget, ByteShare
from vlcache_jax.policies.decoding.append import APPEND
from vlcache_jax.policies.decoding.rule import DecodingRule
from vlcache_jax.policies.methods.kv_zip import KVzip
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.rows.spans import PostVision, Rows
from vlcache_jax.policies.scores.attention import AccumulatedAttention

TIERS: tuple[tuple[int | str, int | str | None], ...] = ((8, 4), (4, "4/2"), (4, None))
"""Bits of the tokens that rank first, and of the others, from the most bytes to the fewest; None: these are dropped."""


@method("ranked_bits", title="Ranked bits")
def RankedBits(
    budget: Budget = 0.3,
    *,
    repeat: bool = False,
    rows: Rows | None = None,
    bits: int | str | None = None,
    decoding: DecodingRule | str = APPEND,
) -> Policy:
    """The tokens that rank first get many bits, the others few or none: as many of each as the bytes allow.

    VL-Cache's ranking (the attention that the post-vision rows give to a token, for every KV head), with the same
    number of tokens in every layer. The budget is one of bytes (`ByteShare`), and alone decides what is spent on what.
    Of these, the first whose others fit is taken, and as many tokens rank first as then have room:

        first                      others                     from a share of the bytes on, at head size 64, 128
        8 bits                     4 bits                     30 %, 27 %
        4 bits                     keys 4, values 2 bits      23 %, 21 %
        4 bits                     dropped                    0

    Keys never get less than 4 bits: at 2 they ruin answers, whoever has them, while values at 2 bits are harmless where
    little attention goes. A tenth of the bytes holds a third of the tokens at 4 bits.

    `repeat` takes the ranking of `KVzip` instead, and its slots, the best of all layers and heads: tokens that the
    model looks at while it says the prompt again. Its prefill is over twice the tokens. An answer that copies out of
    the prompt, token by token, survives eviction only so: the question looks at the first token of what is copied.

    This library's own; measured in docs/pretrained.md.

    Args:
      budget: a share of the bytes that the prompt's cache takes in 16-bit numbers, scales included; a plain fraction
        means that, too, and 1 keeps all as it is. Any other kind of budget says how many tokens rank first, at 4 bits,
        with the others dropped.
      repeat: rank by the prompt's repetition; `rows` then has no use.
      rows: which prompt rows score the keys.
      bits: of the tokens that rank first, instead of the table's.
      decoding: see `Policy`.

    Raises:
      PolicyError: an option out of range, or rows beside `repeat`.

    Example:
      >>> RankedBits(0.25).budget.share
      0.25
    """
    if isinstance(budget, float) and 1e-4 <= budget < 1:
        budget = ByteShare(budget)
    if isinstance(budget, ByteShare):
        budget = ByteShare(budget.share, TIERS)
    elif bits is None and budget != 1:
        bits = 4
    if repeat:
        if rows is not None:
            raise PolicyError("rows has no use with repeat=True, whose rows say the prompt again: give one of them")
        return dataclasses.replace(KVzip(budget, bits=bits, decoding=decoding), name="ranked_bits")
    return Policy(
        name="ranked_bits",
        budget=budget,
        rows=PostVision() if rows is None else rows,
        score=AccumulatedAttention(),
        bits=bits,
        decoding=decoding,
    )
