"""Key norm (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy", arXiv 2406.11430, EMNLP 2024)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.policies.scores.rounding import without_rounding


@dataclasses.dataclass(frozen=True)
class KeyNormScore(Score):
    """Minus the Euclidean norm of the key.

    A rotation does not change a norm, but for rounding: tokens that are alike, such as the row breaks of an image or a
    token that is repeated, would be ranked by that, and otherwise in another batch. So norms between which there is no
    gap larger than rounding are equal: each counts as the smallest of them. (Keys in bfloat16 are rounded after they
    were rotated. Theirs are the norms of what is stored.)
    """

    needs_attention = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        norm = jnp.linalg.norm(inputs.key.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        return -without_rounding(norm, jnp.broadcast_to(inputs.valid[:, None], norm.shape))


@method("key_norm", title="Key norm", query_agnostic=True)
def KeyNorm(budget: Budget = DEFAULT_BUDGET, *, recent: float = 0.1, **options: Unpack[Options]) -> Policy:
    """The tokens with the smallest keys: a small norm goes with much attention, in text models.

        score_j = -|k_j|_2, for every KV head

    Choices. Every layer is compressed (the paper spares the first two of some models), with a window of recent tokens
    like the other methods here; `recent=0.0` keeps only the last token besides. The source is from memory.

    Query-agnostic: no attention is needed, and the answer does not depend on the question.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> KeyNorm().score.needs_attention
      False
    """
    return Policy(name="key_norm", budget=budget, score=KeyNormScore(), recent=recent, **options)
