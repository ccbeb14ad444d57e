"""Sets that are chosen greedily, one token after another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.varying import varying
from vlcache_jax.pruning.similarity import at, dots


def greedy_order(
    x: jax.Array,
    candidate: jax.Array,
    first: jax.Array,
    update: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    most: int,
) -> jax.Array:
    """Scores that fall in the order in which tokens are chosen: each time the one of the largest value, of equal ones
    the first.

    Args:
      x: f32 [batch, n, d], of length 1.
      candidate: bool [batch, n].
      first: f32 [batch, n], values of the first choice.
      update: (number of the choice, values f32 [batch, n], cosines of all with the chosen token) -> the next values.
      most: how many are chosen (static).

    Returns:
      f32 [batch, n]: minus the number of the choice; -inf for those that were not chosen.
    """
    index = jax.lax.iota(jnp.int32, x.shape[1])[None]

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, scores = state
        free = candidate & (scores == -jnp.inf)
        best = jnp.argmax(jnp.where(free, values, -jnp.inf), axis=1).astype(jnp.int32)[:, None]
        scores = jnp.where((index == best) & free, -number.astype(jnp.float32), scores)
        return update(number, values, dots(at(x, best), x)[:, 0]), scores

    start = varying((first, jnp.full(first.shape, -jnp.inf, jnp.float32)), x)
    return jax.lax.fori_loop(0, most, step, start)[1]
