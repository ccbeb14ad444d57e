"""MixKV (arXiv 2510.20707, ICLR 2026), on SnapKV's votes."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.key_difference import unit_keys
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.methods.snap_kv import observation_window, snap_score, unpooled
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.rows.spans import LastRows
from vlcache_jax.policies.scores.attention import Derived, LayerInputs
from vlcache_jax.policies.scores.pooling import skipped
from vlcache_jax.policies.scores.rounding import without_rounding
from vlcache_jax.policies.window import Recent, Window


@dataclasses.dataclass(frozen=True)
class DiversityMixed(Derived):
    """Importance mixed with diversity, more of the latter where the keys of a head are alike.

    For each KV head, over the tokens j before the last `skip` ones:

        importance_j = vote_j + scaled(|v_j|)
        diversity_j  = scaled(-cos(k_j, m)),   m = mean over the prompt of k_i / |k_i|
        scaled(x)    = minmax(x) * mean(vote) / mean(minmax(x)),   minmax(x) = (x - min x) / (max x - min x)
        score_j      = rho * diversity_j + (1 - rho) * importance_j
        rho          = (n |m|^2 - 1) / (n - 1), the mean cosine of two different keys, within [0, 1]

    Attributes:
      score: the votes, not negative.
      skip: last tokens that are left out of the means and extremes; they keep their own score. See `SequencePooled`.
    """

    skip: int | Window = 0

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        vote = self.score(inputs).astype(jnp.float32)
        length, last = vote.shape[-1], skipped(self.skip, inputs)
        inside = jax.lax.iota(jnp.int32, length)[None] < inputs.lengths[:, None] - last
        inside = jnp.broadcast_to(inside[:, None], vote.shape)
        count = jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1).astype(jnp.float32)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(inside, x, 0), axis=-1, keepdims=True) / count

        def scaled(x: jax.Array) -> jax.Array:
            low = jnp.min(jnp.where(inside, x, jnp.inf), axis=-1, keepdims=True)
            high = jnp.max(jnp.where(inside, x, -jnp.inf), axis=-1, keepdims=True)
            spread = jnp.where(high > low, high - low, 1)
            unit = jnp.where(inside & (high > low), (x - low) / spread, 0)
            return unit * mean(vote) / jnp.maximum(mean(unit), 1e-30)

        key, anchor = unit_keys(inputs)
        square = jnp.sum(anchor * anchor, axis=-1)[..., None]  # [batch, kv_heads, 1]
        cosine = jnp.einsum("bhld,bhd->bhl", key, anchor, precision="highest") / jnp.sqrt(jnp.maximum(square, 1e-24))
        n = inputs.lengths.astype(jnp.float32)[:, None, None]
        rho = jnp.clip((n * square - 1) / jnp.maximum(n - 1, 1), 0, 1)
        norm = jnp.linalg.norm(inputs.value.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        # Stretched to [0, 1], the rounding of equal norms would weigh as much as anything.
        norm = without_rounding(norm, jnp.broadcast_to(inputs.valid[:, None], norm.shape))
        mixed = rho * scaled(-cosine) + (1 - rho) * (vote + scaled(norm))
        return jnp.where(inside, mixed, vote)


@method("mix_kv", title="MixKV")
def MixKV(
    budget: Budget = DEFAULT_BUDGET,
    *,
    window: int | None = None,
    pool: int = 5,
    recent: Recent | None = None,
    **options: Unpack[Options],
) -> Policy:
    """SnapKV's votes mixed with the diversity of the keys, so that near-duplicates do not fill the slots.

    The formulas are those of `DiversityMixed`; window, pooling and budgets those of `SnapKV`.

    Choices. rho is measured on the prompt, as in the paper's formula; the authors' release reads it from a file
    measured beforehand.

    Query-aware in its votes, query-agnostic in its diversity.

    Args:
      budget: see `Policy.budget`.
      window: rows that vote, and recent tokens that are kept. By default 32, of which no more are kept
        than `Window(32)` allows.
      pool: odd number of neighbours, 1 for none.
      recent: recent tokens to keep, as in `Policy`; the window by default.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or a window that does not fit into a budget in tokens.

    Example:
      >>> MixKV().rows
      LastRows(count=32)
    """
    count, recent = observation_window(window, recent)
    return Policy(
        name="mix_kv",
        budget=budget,
        rows=LastRows(count),
        score=DiversityMixed(snap_score(pool, recent=recent), unpooled(recent)),
        recent=recent,
        **options,
    )
