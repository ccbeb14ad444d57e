"""Eviction: the answer's rows learn to do with few columns of the prompt, whoever chooses them.

A large model parks the attention it does not need on a few sink tokens. A small one spreads it over the whole image,
and an evicted cache shifts all of that mass to the tokens that are left, which garbles what it writes even where
everything it looks for is still there. So in training, each KV head of an answer sees only those columns of the prompt
that the answer's own rows attend to most, between 12 and 48 of them, or all: an oracle's choice, no method's.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.demo.recipe.ahead import QUESTION, Ahead, take

_KEPT = (12, 20, 28, 48, 100_000)  # columns kept, in turn


def evicted_attention(
    out: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, columns: int, ahead: Ahead
) -> jax.Array:
    """Replaces the attention of the answers' rows in `out` by that over few columns.

    Args:
      out: [batch, length, heads, head_dim], full attention.
      query: like `out`.
      key, value: [batch, length, kv_heads, head_dim].
      segments: i32 [batch, length], see `TrainBatch`.
      columns: the first so many of the prompt hold the images.
      ahead: where questions end and answers begin.
    """
    batch, length, kv_heads, head_dim = key.shape
    last, written = jnp.asarray(ahead.rows)[:, :, :1], jnp.asarray(ahead.targets) >= 0
    segments = jnp.asarray(segments)
    rows = jnp.minimum(
        last + 1 + jax.lax.iota(jnp.int32, written.shape[2])[None, None], length - 1
    )  # [batch, questions, answer]
    near = (
        last + jnp.arange(1 - QUESTION, 1 + written.shape[2], dtype=jnp.int32)[None, None]
    )  # of the question and the answer
    exists = (near >= 0) & (near < length)
    near = jnp.clip(near, 0, length - 1)

    own = exists & (take(segments, near) == take(segments, last)) & (take(segments, last) > 0)
    q = take(query, rows).reshape(*rows.shape, kv_heads, -1, head_dim)
    images = jnp.einsum("bqnkgd,bskd->bkqgns", q, key[:, :columns], preferred_element_type=jnp.float32)
    words = jnp.einsum("bqnkgd,bqskd->bkqgns", q, take(key, near), preferred_element_type=jnp.float32)
    seen = own[:, :, None] & (near[:, :, None] <= rows[..., None])  # [batch, questions, answer, near]
    words = jnp.where(seen[:, None, :, None], words, -1e9)
    prefix = (segments[:, :columns] == 0)[:, None, None, None, None]
    logits = jnp.concatenate([jnp.where(prefix, images, -1e9), words], axis=-1) * head_dim**-0.5

    weights = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1) * written[:, None, :, None, :, None].astype(
        jnp.float32
    )
    wanted = jnp.sum(weights, axis=(3, 4))  # [batch, kv_heads, questions, columns + near]
    prompt = jnp.concatenate([jnp.ones((batch, last.shape[1], columns), bool), own & (near <= last)], axis=-1)[:, None]
    turn = jax.lax.iota(jnp.int32, batch)[:, None] + jax.lax.iota(jnp.int32, last.shape[1])[None]
    turn = (turn + jnp.sum(last, dtype=jnp.int32) % 7) % len(_KEPT)
    kept = largest(jnp.where(prompt, wanted, -1.0), jnp.asarray(_KEPT)[turn][:, None, :, None])
    logits = jnp.where((kept | ~prompt)[:, :, :, None, None], logits, -1e9)

    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    new = jnp.einsum("bkqgns,bskd->bqnkgd", weights[..., :columns], value[:, :columns])
    new = new + jnp.einsum("bkqgns,bqskd->bqnkgd", weights[..., columns:], take(value, near))
    target = jnp.where(written & (last > 0), rows, length).reshape(batch, -1)  # past the end: dropped
    new = new.reshape(batch, target.shape[1], *out.shape[2:]).astype(out.dtype)
    return out.at[jax.lax.iota(jnp.int32, batch)[:, None], target].set(new, mode="drop")
