"""Clusters by density peaks (Rodriguez and Laio, Science 344), and their means."""

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.pruning.similarity import at, dots

_NEIGHBOURS = 5


def merged_clusters(
    hidden: jax.Array, index: jax.Array, count: jax.Array, clusters: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """The means of clusters of some tokens.

    With s_ij the distance of two tokens over the root of their size, the density of one is exp(- the mean of s_ij^2 of
    its 5 nearest, itself included); delta is the distance to the nearest that is denser, or, for the densest, the
    largest distance of any two. Centres are those with the largest density x delta; each token goes to the nearest.

    Args:
      hidden: [batch, n, d].
      index: i32 [batch, m], ascending, the tokens to cluster; n beyond them.
      count: i32 [batch], how many these are.
      clusters: i32 [batch], how many clusters, at most `most` (static).

    Returns:
      (i32 [batch, most], the token at the centre of each cluster, n beyond them; f32 [batch, most, d], its mean).
    """
    n, m = hidden.shape[1], index.shape[1]
    valid = jax.lax.iota(jnp.int32, m)[None] < count[:, None]
    x = jnp.where(valid[..., None], at(hidden, jnp.minimum(index, n - 1)).astype(jnp.float32), 0)
    squares = jnp.sum(x * x, axis=-1)
    distance = jnp.maximum(squares[:, :, None] + squares[:, None] - 2 * dots(x, x), 0) / x.shape[-1]  # squared
    distance = jnp.where(jnp.eye(m, dtype=bool)[None], 0, distance)
    pair = valid[:, :, None] & valid[:, None]
    near = -jax.lax.top_k(jnp.where(pair, -distance, -jnp.inf), min(_NEIGHBOURS, m))[0]
    there = jnp.isfinite(near)
    mean = jnp.sum(jnp.where(there, near, 0), axis=-1) / jnp.maximum(jnp.sum(there, axis=-1, dtype=jnp.float32), 1)
    density = jnp.where(valid, jnp.exp(-mean), -jnp.inf)
    distance = jnp.sqrt(distance)
    denser = pair & (density[:, None] > density[:, :, None])
    delta = jnp.min(jnp.where(denser, distance, jnp.inf), axis=-1)
    farthest = jnp.max(jnp.where(pair, distance, 0), axis=(1, 2))[:, None]
    peak = jnp.where(valid, jnp.where(jnp.isfinite(delta), delta, farthest) * density, -jnp.inf)
    is_centre = valid & largest(peak, clusters[:, None])
    centre = indices(is_centre, min(most, m))
    real, place = centre < m, jnp.minimum(centre, m - 1)
    to_centres = jnp.take_along_axis(distance, place[:, None], axis=2)  # [batch, m, most]
    goes = jnp.argmin(jnp.where(real[:, None], to_centres, jnp.inf), axis=-1)
    goes = (jax.nn.one_hot(goes, place.shape[1], dtype=bool) & valid[..., None]).astype(jnp.float32)
    own = (jnp.cumsum(is_centre, axis=1, dtype=jnp.int32) - 1)[..., None] == jax.lax.iota(jnp.int32, place.shape[1])[
        None, None
    ]
    goes = jnp.where(is_centre[..., None], own.astype(jnp.float32), goes)
    means = jnp.einsum("bmc,bmd->bcd", goes, x, precision="highest")
    means = means / jnp.maximum(jnp.sum(goes, axis=1), 1)[..., None]
    return jnp.where(real, at(index, place), n), means
