"""Two rankings one after the other: some tokens for one score, the others for another."""

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.window import Recent, forced, settled


def open_tokens(inputs: LayerInputs, recent: Recent, sinks: int = 0) -> tuple[jax.Array, jax.Array]:
    """What sinks and window of an average layer leave to the scores.

    Args:
      inputs: of a layer.
      recent, sinks: the policy's.

    Returns:
      (which tokens compete bool [batch, length], for how many slots i32 [batch]).
    """
    assert inputs.slots is not None
    latest, first = forced(inputs.slots, settled(recent, inputs.slots), sinks)
    place = jax.lax.iota(jnp.int32, inputs.key.shape[1])[None]
    competes = (place >= first[:, None]) & (place < (inputs.lengths - latest)[:, None])
    return competes, jnp.maximum(inputs.slots - latest - first, 0)


def staged(first: jax.Array, second: jax.Array, competes: jax.Array, count: jax.Array) -> jax.Array:
    """A score that ranks the `count` best by `first` before all others, which follow by `second`.

    Args:
      first, second: f32 [batch, heads, length], not negative. Those whose first score is 0 are not among the best.
      competes: bool [batch, length], the tokens of which `count` are chosen.
      count: i32 [batch].

    Returns:
      f32 [batch, heads, length].

    Example:
      >>> first, second = jnp.array([[[3.0, 1.0, 2.0, 0.0]]]), jnp.array([[[0.0, 5.0, 1.0, 7.0]]])
      >>> jnp.argsort(-staged(first, second, jnp.ones((1, 4), bool), jnp.array([2]))).tolist()
      [[[0, 2, 3, 1]]]
    """
    eligible = competes[:, None] & (first > 0)
    best = largest(jnp.where(eligible, first, -jnp.inf), count[:, None, None]) & eligible
    top = jnp.max(jnp.where(competes[:, None], second, 0), axis=-1, keepdims=True)
    ranked = jnp.where(best, top + first, second)
    return ranked + 0 * (first + second)  # what is not finite shows
