"""Attention within short runs of a sequence, such as the windows of a vision tower.

Tokens of a run see each other and nothing else. No run is longer than `longest`, so all that a block of `longest`
queries sees lies in its own block and the two beside it: one batch of small matrix products, linear in the length.

    runs      0 0 0 1 1 1 1 2 | 2 2 2 3 3 4 4 4 | 5 5 ...
    queries                     [=============]
    keys      [=============]   [=============]   [== ...
"""

import jax
import jax.numpy as jnp

_NONE = -2  # the run of keys beyond the ends; no query is of it


def runs_of(*keys: jax.Array) -> jax.Array:
    """Numbers of the runs in which none of `keys`, i32 [batch, length], changes: i32 [batch, length], from 0 on.

    Example:
      >>> runs_of(jnp.asarray([[7, 7, 3, 3, 3, 7]])).tolist()
      [[0, 0, 1, 1, 1, 2]]
    """
    changes = jnp.stack([key[:, 1:] != key[:, :-1] for key in keys]).any(axis=0)
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def run_attention(query: jax.Array, key: jax.Array, value: jax.Array, runs: jax.Array, longest: int) -> jax.Array:
    """Attention of each run with itself; softmax in float32.

    Args:
      query, key, value: [batch, length, heads, head_dim].
      runs: i32 [batch, length] from 0 on, the same number in consecutive tokens alone.
      longest: no run that matters has more tokens. What tokens of longer ones (padding, say) get means nothing, but is
        finite.

    Returns:
      [batch, length, heads, head_dim] in the dtype of `value`.
    """
    batch, length, heads, head_dim = query.shape
    blocks = -(-length // longest)

    def cut(x: jax.Array, fill: int = 0) -> jax.Array:  # [batch, blocks, longest, ...]
        x = jnp.pad(x, ((0, 0), (0, blocks * longest - length), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return x.reshape(batch, blocks, longest, *x.shape[2:])

    def with_neighbours(x: jax.Array, fill: int = 0) -> jax.Array:  # [batch, blocks, 3 * longest, ...]
        x = jnp.pad(x, ((0, 0), (1, 1), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    of_query = cut(runs, -1)
    seen = of_query[..., :, None] == with_neighbours(of_query, _NONE)[..., None, :]
    logits = jnp.einsum("bnqhd,bnkhd->bnhqk", cut(query), with_neighbours(cut(key)), preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, :, None], logits * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, with_neighbours(cut(value)))
    return out.reshape(batch, -1, heads, head_dim)[:, :length]
