"""Attention in plain XLA for CPUs: one (row of the batch, KV head) at a time, which stays in cache.

Its query rows come in chunks, against the keys that the mask lets any of them see:

    keys      0 ..................... length
    rows 0    [=======]
    rows 1    [===============]
    rows 2    [=======================]        each `span` of rows is a static slice, at most `_SPANS` of them

Two to three times faster there than one large einsum, whose batched products XLA runs poorly. On accelerators it would
be slow: see `xla_wide`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.attention.mask import Mask
from vlcache_jax.kernels.chunks import in_chunks

_CHUNK = 128  # query rows whose logits exist at once
_SPANS = 8  # static slices of the triangle: bounds the size of the program for long prompts
_WHOLE = 1024  # tokens of an image whose logits may exist at once, of one head


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    lengths: jax.Array | None,
    *,
    scale: float,
    with_lse: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.attention`. `lengths` changes nothing: the mask keeps the padding out."""
    del lengths
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    # [batch, length, heads, d] -> [batch * kv_heads, group, length, d]
    q = query.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group, length, head_dim)
    k, v = (x.swapaxes(1, 2).reshape(batch * kv_heads, length, head_dim) for x in (key, value))
    masks = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0)[:, None], mask)

    def one_head(item: tuple[jax.Array, jax.Array, jax.Array, Mask]) -> tuple[jax.Array, jax.Array | None]:
        q, k, v, mask = item
        if mask.full and length <= _WHOLE:
            return _whole(q, k, v, scale, with_lse)
        if not mask.triangular and mask.window is None:
            return _rows(q, 0, k, v, 0, mask, scale)
        span = -(-length // (_SPANS * _CHUNK)) * _CHUNK
        parts = []
        for i in range(0, length, span):
            left, right = mask.span(i, i + span, length)
            parts.append(_rows(q[:, i : i + span], i, k[left:right], v[left:right], left, mask, scale))
        return jnp.concatenate([p[0] for p in parts], axis=1), jnp.concatenate([p[1] for p in parts], axis=1)

    out, lse = jax.lax.map(one_head, (q, k, v, masks))
    out = out.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    if not with_lse:
        return out.reshape(query.shape), None
    lse = lse.reshape(batch, kv_heads, group, length).transpose(0, 3, 1, 2)
    return out.reshape(query.shape), lse.reshape(batch, length, heads)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _whole(q, k, v, scale, with_lse):  # q [group, length, d], k v [length, d]
    logits = jnp.einsum("gqh,kh->gqk", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return weights @ v, jax.nn.logsumexp(logits, axis=-1) if with_lse else None


def _rows(q, first, k, v, left, mask, scale):  # of one head; columns from `left` on
    return in_chunks(lambda part, start: _chunk(part, first + start, k, v, left, mask, scale), q, _CHUNK)


def _chunk(q, first, k, v, left, mask, scale):
    @jax.checkpoint  # the backward pass recomputes the logits instead of keeping them for every head
    def attend(q, k, v):
        group, rows, head_dim = q.shape
        logits = jnp.matmul(q.reshape(group * rows, head_dim), k.T, preferred_element_type=jnp.float32)
        logits = (logits * scale).reshape(group, rows, -1)
        row, column = first + jax.lax.iota(jnp.int32, rows), left + jax.lax.iota(jnp.int32, k.shape[0])
        logits = jnp.where(mask.between(row, column), logits, jnp.finfo(jnp.float32).min)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return out.astype(v.dtype), (highest + jnp.log(total))[..., 0]

    return attend(q, k, v)
