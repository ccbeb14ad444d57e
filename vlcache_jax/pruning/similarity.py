"""Cosines of tokens, in float32, and orders of choice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.pruning.stage import Stage

AT_ONCE = 256
"""Tokens that are compared with all others at once."""


def unit(x: jax.Array, where: jax.Array) -> jax.Array:
    """Vectors [batch, n, d] of length 1 in float32; zeros where bool [batch, n] is False, and of zeros."""
    x = jnp.where(where[..., None], x.astype(jnp.float32), 0)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of x f32 [batch, m, d] with y [batch, n, d]: [batch, m, n], without rounding of the operands."""
    return jnp.einsum("bmd,bnd->bmn", x, y, precision="highest")


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """[batch, n, ...] at i32 [batch, m]: [batch, m, ...]."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)


def put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """[batch, n, d] with `new` [batch, m, d] at i32 [batch, m], which no two of a row share; beyond the end nothing."""

    def of_rows(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        rows = jax.lax.iota(jnp.int32, len(index))[:, None]
        return x.at[rows, index].set(new.astype(x.dtype), mode="drop")

    return by_row(of_rows, len(x))(x, index, new)


def each(x: jax.Array, y: jax.Array, function: Callable[[jax.Array, jax.Array], Any]) -> Any:
    """What is to be known of each token, from its products with all others; some tokens at a time.

    Args:
      x: f32 [batch, m, d], y: f32 [batch, n, d].
      function: (number of the token in x, its products with y, f32 [batch, n]) -> pytree of [batch].

    Returns:
      The same of all tokens, [batch, m].
    """
    of_one = lambda item: function(item[0], dots(item[1][:, None], y)[:, 0])  # noqa: E731
    numbers = jax.lax.iota(jnp.int32, x.shape[1])
    return jax.tree.map(lambda z: z.T, jax.lax.map(of_one, (numbers, x.swapaxes(0, 1)), batch_size=AT_ONCE))


def nearest(
    x: jax.Array, among: jax.Array, *, itself: bool = True, groups: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """For each token another one with the largest cosine, of equal ones the first.

    Args:
      x: f32 [batch, n, d], of length 1.
      among: bool [batch, n], which there are to choose from.
      itself: whether a token may be its own.
      groups: i32 [batch, n]: those of another group come after all of the same.

    Returns:
      (i32 [batch, n], f32 [batch, n], the cosine, minus 4 if it is of another group; -inf if there is none).
    """
    index = jax.lax.iota(jnp.int32, x.shape[1])[None]

    def of_one(number: jax.Array, cosines: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = jnp.where(among if itself else among & (index != number), cosines, -jnp.inf)
        if groups is not None:
            found = found - jnp.where(groups == jnp.take(groups, number, axis=1)[:, None], 0.0, 4.0)
        return jnp.argmax(found, axis=1).astype(jnp.int32), jnp.max(found, axis=1)

    return each(x, x, of_one)


def groups_of(stage: Stage) -> jax.Array:
    """i32 [batch, room]: the tile or frame of each visual token; 0 of all where the model does not tell."""
    return jnp.zeros_like(stage.vision_index) if stage.grid is None else stage.grid[:, 0]


def sums_at(x: jax.Array, index: jax.Array, where: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Sums of the vectors that go to each place, and how many go there; by matrix products, in one order everywhere.

    Args:
      x: f32 [batch, n, d], index: i32 [batch, n], where: bool [batch, n], which of them go anywhere.
      size: places.

    Returns:
      (f32 [batch, size, d], f32 [batch, size]).
    """
    blocks = -(-x.shape[1] // AT_ONCE)
    pad = blocks * AT_ONCE - x.shape[1]

    def in_blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(len(x), blocks, -1, *x.shape[2:]).swapaxes(0, 1)

    def add(total: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> tuple[Any, None]:
        x, index, where = block
        goes = (where[..., None] & jax.nn.one_hot(index, size, dtype=bool)).astype(jnp.float32)
        sums = jnp.einsum("bns,bnd->bsd", goes, jnp.where(where[..., None], x, 0), precision="highest")
        return (total[0] + sums, total[1] + jnp.sum(goes, axis=1)), None

    start = jnp.zeros((len(x), size, x.shape[-1]), jnp.float32), jnp.zeros((len(x), size), jnp.float32)
    return jax.lax.scan(add, varying(start, x), tuple(map(in_blocks, (x, index, where))))[0]
