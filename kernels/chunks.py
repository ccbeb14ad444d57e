"""A few rows at a time, where all at once would take too much memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_chunks(function: Callable[[Any, jax.Array | int], Any], arrays: Any, size: int) -> Any:
    """`function(part, start)` of `size` entries of the second axis at a time, one part after the other.

    Args:
      function: from arrays [rows, size, ...] and the index i32 [] of their first entry to arrays [rows, size, ...].
      arrays: a pytree of arrays [rows, n, ...]; the last part is filled up with zeros.
      size: of a part.

    Returns:
      Like the results of `function`, [rows, n, ...].
    """
    n = jax.tree.leaves(arrays)[0].shape[1]
    if n <= size:
        return function(arrays, 0)
    count = -(-n // size)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - n), *[(0, 0)] * (x.ndim - 2)))
        # Parts of the loop's input, not slices that it cuts: a backward pass stacks what it made of each.
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    starts = size * jax.lax.iota(jnp.int32, count)
    found = jax.lax.map(lambda part: function(*part), (jax.tree.map(cut, arrays), starts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :n], found)
