"""Plain XLA for accelerators: all rows of the batch and all heads at once, in one fused batch of matrix products.

Where the logits of a whole sequence would take more than `_LOGITS` bytes, query rows come in chunks, against the keys
that the mask lets any of them see:

    keys      0 ..................... length
    span 0    [=======]
    span 1    [===============]
    span 2    [=======================]        each span of rows is a static slice, at most `_SPANS` of them
"""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.attention.mask import Mask
from vlcache_jax.kernels.chunks import in_chunks

_LOGITS = 2**30  # bytes of the logits that exist at once
_SPANS = 8  # static slices of the triangle: bounds the size of the program for long prompts
_SUBLANES = 8  # a chunk is a multiple of it: rows of a TPU's registers


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
    q = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    spans = min(_SPANS, -(-length // _chunk_rows(batch * heads, length)))
    if not mask.triangular and mask.window is None:
        spans = 1
    span = -(-length // (spans * _SUBLANES)) * _SUBLANES
    parts = []
    for first in range(0, length, span):
        last = min(first + span, length)
        left, right = mask.span(first, last, length)
        rows = _chunk_rows(batch * heads, right - left)
        parts.append(_rows(q[:, first:last], first, key[:, left:right], value[:, left:right], left, mask, scale, rows))
    out, lse = (jnp.concatenate(x, axis=1) if len(parts) > 1 else x[0] for x in zip(*parts))
    return out.reshape(query.shape), lse.reshape(batch, length, heads) if with_lse else None


def _chunk_rows(heads: int, columns: int) -> int:
    """Query rows whose logits against so many columns fit."""
    return max(_LOGITS // (4 * heads * columns) // _SUBLANES, 1) * _SUBLANES


def _rows(
    q, first, k, v, left, mask, scale, chunk
):  # q [batch, rows, kv_heads, group, d], k v [batch, columns, kv_heads, d]
    rows = q.shape[1]
    chunk = -(-rows // (-(-rows // chunk) * _SUBLANES)) * _SUBLANES  # of equal size: few rows are computed for nothing
    return in_chunks(lambda part, start: _chunk(part, first + start, k, v, left, mask, scale), q, chunk)


def _chunk(q, first, k, v, left, mask, scale):
    rows, columns = q.shape[1], k.shape[1]

    @jax.checkpoint  # the backward pass recomputes the logits instead of keeping them for every layer
    def attend(q, k, v):
        logits = scale * jnp.einsum("btngd,bsnd->bngts", q, k, preferred_element_type=jnp.float32)
        if not mask.full:
            row, column = first + jax.lax.iota(jnp.int32, rows), left + jax.lax.iota(jnp.int32, columns)
            logits = jnp.where(mask.between(row, column)[:, None, None], logits, jnp.finfo(jnp.float32).min)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("bngts,bsnd->btngd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = out / total[..., 0].transpose(0, 3, 1, 2)[..., None]
        return out.astype(v.dtype), (highest + jnp.log(total))[..., 0].transpose(0, 3, 1, 2)

    return attend(q, k, v)
