"""LOOK-M (Wan et al., arXiv 2406.18139, Findings of EMNLP 2024)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.evicted.drop import Drop
from vlcache_jax.policies.evicted.merge import Merge
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy, StoreOptions
from vlcache_jax.policies.rows.spans import AllRows
from vlcache_jax.policies.scores.attention import AccumulatedAttention, Derived, LayerInputs


@dataclasses.dataclass(frozen=True)
class TextPrior(Derived):
    """A score of 0 or more, with its largest value added for text tokens (LOOK-M, equations 4 and 5).

        S'_j = S_j + max_i S_i   for text tokens j, the maximum over the whole prompt and one KV head
        S'_j = S_j               for visual ones

    Given as ranks: 0 for the lowest S' of the prompt, equal ones alike. The sum itself would round small differences
    between text tokens away.
    """

    is_mass = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        scores = self.score(inputs).astype(jnp.float32)
        valid = jnp.broadcast_to(inputs.valid[:, None], scores.shape)
        text = jnp.broadcast_to(~inputs.vision_mask[:, None], scores.shape)
        scores = jnp.where(valid, scores, 0)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        # S' as (part, rest), compared in this order: above the maximum (2), equal to it (1), below (0).
        part = jnp.where(text, jnp.where(scores > 0, 2, 1), jnp.where(scores == largest, 1, 0))
        rest = jnp.where(part == 1, 0, scores)
        part = jnp.where(valid, part, -1)
        index = jnp.broadcast_to(jax.lax.iota(jnp.int32, scores.shape[-1]), scores.shape)
        part, rest, index = jax.lax.sort((part, rest, index), num_keys=2)
        same = (part[..., 1:] == part[..., :-1]) & (rest[..., 1:] == rest[..., :-1])
        counted = ~same & (part[..., :-1] >= 0)  # not from padding to the lowest
        rank = jnp.cumsum(jnp.pad(counted, ((0, 0), (0, 0), (1, 0))), axis=-1, dtype=jnp.int32)
        rank = jnp.take_along_axis(rank, jnp.argsort(index, axis=-1), axis=-1).astype(jnp.float32)
        return jnp.where(jnp.isfinite(scores), rank, jnp.nan)


@method("look_m", title="LOOK-M", query_agnostic=True)
def LookM(
    budget: Budget = 0.2,
    *,
    recent: float = 0.5,
    merge: str | None = "pivotal",
    selection: str = "paper",
    **options: Unpack[StoreOptions],
) -> Policy:
    """Text first: the recent tokens, then text, then the visual tokens with the most attention; the rest is merged.

        S_j = sum over all rows q of A[q, j], averaged over the query heads of a KV head
        S_j = S_j + max_i S_i   for text tokens j: they rank before the visual ones
        every other token is merged into the kept one whose key is most like its own (`Merge`)

    The published setting keeps 10 % important and 10 % recent tokens: a budget of 0.2, half of it recent.

    Choices. The budget is a promise, as in the paper: if the text outside the window exceeds what the window leaves,
    it is ranked by score. The authors' code keeps all of it then, above its budget, which no store of fixed shape
    could hold; up to that point it and `selection="code"` keep the same. `selection="paper"` compares S_j as printed,
    in exact arithmetic. The two differ in one tie only: text that no row attends to (S_j = 0, as in an underflow) is
    level with the visual token of the largest score in "paper", so the lower position goes first, and goes before it
    in "code". Scores of grouped query heads are averaged (the original has no groups).

    Merging follows the authors' code: the recent tokens may be merged into, keys are merged as rotated, the map of the
    keys serves the values. It is computed in float32 and rounded once. For "weighted" their code leaves out members of
    below-average cosine, by a rule that mixes different tokens of different heads; here, as in the paper, all count.

    Its rows are the whole prompt: mostly query-agnostic.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens.
      merge: "pivotal" (which the authors recommend), "averaged", "weighted"; None drops what is not kept.
      selection: "paper" or "code".
      **options: see `StoreOptions`; with merge=None only.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> LookM().evicted, LookM(merge=None).evicted
      (Merge(kind='pivotal'), Drop())
    """
    if selection not in ("paper", "code"):
        raise PolicyError(f"selection={selection!r} is not known: use 'paper' or 'code'")
    score = AccumulatedAttention()
    return Policy(
        name="look_m",
        budget=budget,
        rows=AllRows(),
        score=TextPrior(score) if selection == "paper" else score,
        recent=recent,
        protect="text" if selection == "code" else None,
        evicted=Drop() if merge is None else Merge(merge),
        **options,
    )
