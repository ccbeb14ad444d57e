"""Attention of a few tokens of a stage, by which most methods choose."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import local, split_axes
from vlcache_jax.pruning.method import Project
from vlcache_jax.pruning.stage import Stage

_ROWS = 64  # whose attention is looked at together


def of_last_token(
    project: Project, stage: Stage, layer: int, *, over: jax.Array | None = None, rotated: bool = True
) -> jax.Array:
    """The attention of each row's last token, f32 [batch, room], averaged over query heads.

        mean over heads of softmax over j of q_(n-1) . k_j / sqrt(d)

    Args:
      project: see `Between`.
      stage: tokens as they enter the layer.
      layer: whose queries and keys these are.
      over: bool [batch, room], the tokens that the softmax is over; all by default.
      rotated: with rotary positions, or as if all tokens were at position 0.
    """
    last, positions = stage.tokens(stage.lengths[:, None] - 1)
    places = (positions, stage.positions) if rotated else (jnp.zeros_like(positions), jnp.zeros_like(stage.positions))
    query, _, _ = project(layer, last, places[0])
    _, key, _ = project(layer, stage.hidden, places[1])
    batch, head_dim = query.shape[0], query.shape[-1]
    query = query.reshape(batch, key.shape[2], -1, head_dim)
    logits = jnp.einsum("bhgd,bshd->bhgs", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    over = stage.valid if over is None else over
    attention = jax.nn.softmax(jnp.where(over[:, None, None], logits, -jnp.inf), axis=-1)
    return jnp.mean(attention, axis=(1, 2))


def row_weighted(
    query: jax.Array,
    key: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    *,
    temperature: float = 1.0,
    columns: jax.Array | None = None,
) -> jax.Array:
    """Sums over rows of the causal attention: sum over i of weights[h, i] A[h, i, j], some rows at a time.

    Args:
      query: [batch, n, heads, head_dim], rotated; key: [batch, n, kv_heads, head_dim].
      weights: f32 [batch, heads, n]; those of padding do not count.
      lengths: i32 [batch].
      temperature: of the softmax, which is of logits / temperature.
      columns: bool [batch, n], what all rows see instead of what came before them.

    Returns:
      f32 [batch, heads, n].
    """
    batch, n, _, head_dim = query.shape
    kv_heads, size = key.shape[2], min(_ROWS, n)
    blocks = -(-n // size)
    column = jax.lax.iota(jnp.int32, n)[None]

    def of_rows(
        query: jax.Array, key: jax.Array, weights: jax.Array, lengths: jax.Array, columns: jax.Array | None
    ) -> jax.Array:
        query = query.reshape(len(query), n, key.shape[2], -1, head_dim)
        weights = jnp.where(column[:, None] < lengths[:, None, None], weights, 0)

        def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
            start = jnp.minimum(block * size, n - size)
            row = start + jax.lax.iota(jnp.int32, size)[None]
            rows = jax.lax.dynamic_slice_in_dim(query, start, size, axis=1)
            logits = jnp.einsum("bqhgd,bkhd->bhgqk", rows, key, preferred_element_type=jnp.float32)
            seen = (column <= row[0][:, None])[None] if columns is None else columns[:, None]
            logits = jnp.where(seen[:, None, None], logits * (head_dim**-0.5 / temperature), -jnp.inf)
            weight = jax.lax.dynamic_slice_in_dim(weights, start, size, axis=2)
            weight = jnp.where((row >= block * size)[:, None], weight, 0)  # the last block goes back
            weight = weight.reshape(*logits.shape[:3], size)
            share = jax.nn.softmax(logits, axis=-1)
            if columns is not None:
                share = jnp.where(jnp.any(columns, axis=1)[:, None, None, None, None], share, 0)
            return total + jnp.einsum("bhgq,bhgqk->bhgk", weight, share, precision="highest"), None

        start = varying(jnp.zeros((len(key), key.shape[2], query.shape[3], n), jnp.float32), (query, key, weights))
        total, _ = jax.lax.scan(add, start, jax.lax.iota(jnp.int32, blocks))
        return total.reshape(len(key), -1, n)

    rows, split_heads = split_axes(batch, kv_heads)
    split, column_split = PartitionSpec(rows, None, split_heads), PartitionSpec(rows, split_heads)
    inputs = (split, split, column_split, PartitionSpec(rows), None if columns is None else PartitionSpec(rows))
    return local(of_rows, inputs, column_split)(query, key, weights, lengths, columns)
