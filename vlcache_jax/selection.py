"""Which tokens a layer keeps: the recent ones, and the best scores among the rest."""

import jax
import jax.numpy as jnp

from vlcache_jax.fractions import floor_fraction


def _best(scores: jax.Array, positions: jax.Array, lengths: jax.Array, recent: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` first entries: recent ones, then by falling score, ties to the lower; padding last.

    A score that is infinite or not a number never overrides that order: NaN ranks like -inf, behind all finite ones.

    scores f32 [batch, heads, entries], positions i32 [batch, heads or 1, entries] ascending, lengths i32 [batch],
    recent i32 [batch] -> i32 [batch, heads, count].
    """
    end = lengths[:, None, None]
    finite = jnp.nan_to_num(scores.astype(jnp.float32), nan=jnp.finfo(jnp.float32).min)
    priority = jnp.where(positions >= end - recent[:, None, None], jnp.inf, finite)
    priority = jnp.where(positions < end, priority, -jnp.inf)
    return jax.lax.top_k(priority, count)[1]  # equal values: lower index first


def candidates(scores: jax.Array, lengths: jax.Array, recent: float, count: int) -> jax.Array:
    """The tokens a layer hands on when it may hand on only `count`; they contain every selection of up to `count`.

    If a layer gets s <= count slots it keeps its r(s) = max(1, floor(recent * s)) latest tokens and the s - r(s) best
    others. Both r and s - r grow with s, so the r(count) latest and the count - r(count) best others contain them.

    Args:
      scores: f32 [batch, heads, length].
      lengths: i32 [batch].
      recent: as in `Policy`.
      count: tokens to hand on, at most length.

    Returns:
      i32 [batch, heads, count] prompt positions, ascending. For prompts shorter than `count`, padding comes last.
    """
    batch, _, length = scores.shape
    positions = jnp.arange(length)[None, None]
    latest = jnp.full((batch,), max(1, floor_fraction(count, recent)), jnp.int32)
    return jnp.sort(_best(scores, positions, lengths, latest, count), axis=-1)


def select(scores: jax.Array, positions: jax.Array, lengths: jax.Array, slots: jax.Array, recent: float) -> jax.Array:
    """The tokens a layer keeps, in ascending order.

    Args:
      scores: f32 [batch, heads, entries] of the candidates.
      positions: i32 [batch, heads or 1, entries], their prompt positions, ascending; entries at or beyond the true
        length are padding.
      lengths: i32 [batch].
      slots: i32 [batch], tokens to keep, at most min(entries, length).
      recent: as in `Policy`.

    Returns:
      i32 [batch, heads, entries]: the first `slots` are the indices of the kept entries, ascending; the rest is
        `entries`.

    Example:
      >>> scores = jnp.array([[[0.5, 0.9, 0.7, 0.0]]])
      >>> select(scores, jnp.arange(4)[None, None], jnp.array([4]), jnp.array([2]), recent=0.1).tolist()
      [[[1, 3, 4, 4]]]
    """
    entries = scores.shape[-1]
    latest = jnp.maximum(1, floor_fraction(slots, recent))
    order = _best(scores, positions, lengths, latest, entries)
    kept = jnp.arange(entries) < slots[:, None, None]
    return jnp.sort(jnp.where(kept, order, entries), axis=-1)
