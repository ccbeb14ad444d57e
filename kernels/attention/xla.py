"""Chunked attention in plain XLA, for platforms without a fused kernel.

One (row of the batch, KV head) at a time; its query rows in chunks against the keys up to the chunk's end:

    keys      0 ..................... length
    rows 0    [=======]
    rows 1    [===============]
    rows 2    [=======================]        each `span` of rows is a static slice, at most `_SPANS` of them

On a CPU this is also two to three times faster than one large einsum, whose batched products XLA runs poorly.
"""

import jax
import jax.numpy as jnp

_CHUNK = 128  # query rows whose logits exist at once
_SPANS = 8  # static slices of the triangle: bounds the size of the program for long prompts


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    lengths: jax.Array | None,
    *,
    scale: float,
    with_lse: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.attention`. `lengths` changes nothing: causality keeps the padding out."""
    del lengths
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
    # [batch, length, heads, d] -> [batch * kv_heads, group, length, d]
    q = query.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group, length, head_dim)
    k, v = (x.swapaxes(1, 2).reshape(batch * kv_heads, length, head_dim) for x in (key, value))

    def one_head(item: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return _one_head(*item, scale=scale)

    out, lse = jax.lax.map(one_head, (q, k, v, jnp.repeat(segments, kv_heads, axis=0)))
    out = out.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    lse = lse.reshape(batch, kv_heads, group, length).transpose(0, 3, 1, 2)
    return out.reshape(query.shape), lse.reshape(batch, length, heads) if with_lse else None


def _one_head(q, k, v, segments, *, scale):  # q [group, length, d], k v [length, d], segments [length]
    length = q.shape[1]
    span = -(-length // (_SPANS * _CHUNK)) * _CHUNK
    parts = [
        _rows(q[:, i : i + span], i, segments[i : i + span], k[: i + span], v[: i + span],
              segments[: i + span], scale=scale)
        for i in range(0, length, span)
    ]  # fmt: skip
    return jnp.concatenate([p[0] for p in parts], axis=1), jnp.concatenate([p[1] for p in parts], axis=1)


def _rows(q, first, row_segments, k, v, segments, *, scale):
    group, rows, head_dim = q.shape
    if rows <= _CHUNK:
        return _chunk(q, first, row_segments, k, v, segments, scale=scale)
    pad = -rows % _CHUNK
    chunks = (rows + pad) // _CHUNK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0))).reshape(group, chunks, _CHUNK, head_dim).swapaxes(0, 1)
    row_segments = jnp.pad(row_segments, (0, pad)).reshape(chunks, _CHUNK)
    starts = first + _CHUNK * jax.lax.iota(jnp.int32, chunks)

    def one_chunk(chunk):
        q, first, row_segments = chunk
        return _chunk(q, first, row_segments, k, v, segments, scale=scale)

    out, lse = jax.lax.map(one_chunk, (q, starts, row_segments))
    out = out.swapaxes(0, 1).reshape(group, -1, head_dim)
    return out[:, :rows], lse.swapaxes(0, 1).reshape(group, -1)[:, :rows]


def _chunk(q, first, row_segments, k, v, segments, *, scale):
    @jax.checkpoint  # the backward pass recomputes the logits instead of keeping them for every head
    def attend(q, k, v):
        group, rows, head_dim = q.shape
        logits = jnp.matmul(q.reshape(group * rows, head_dim), k.T, preferred_element_type=jnp.float32)
        logits = (logits * scale).reshape(group, rows, -1)
        row, column = first + jax.lax.iota(jnp.int32, rows)[:, None], jax.lax.iota(jnp.int32, k.shape[0])[None]
        visible = (column <= row) & ((segments == 0)[None] | (segments[None] == row_segments[:, None]))
        logits = jnp.where(visible[None], logits, jnp.finfo(jnp.float32).min)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return out.astype(v.dtype), (highest + jnp.log(total))[..., 0]

    return attend(q, k, v)
