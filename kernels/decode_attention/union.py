"""Attention over several segments at once: the kept prompt and the generated tokens, say.

A store may have fewer rows than the query. It is then shared, never repeated: the queries of the rows that share a row
of the store become one block of queries of that row.

    query rows      | 0  1  2 | 3  4  5 |        3 questions to each of 2 prompts
    prompt, 2 rows  |    0    |    1    |        2 rows of 3 queries
    answers, 6 rows | 0  1  2   3  4  5 |
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from vlcache_jax.kernels.chunks import in_chunks
from vlcache_jax.kernels.decode_attention import xla
from vlcache_jax.kernels.decode_attention.api import ORDER, decode_attention
from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.dispatch import dispatch
from vlcache_jax.kernels.merge import merge
from vlcache_jax.kernels.rotation import rotated

Part = tuple[Store, Segments]
Attention = tuple[jax.Array, jax.Array]

_MOST_ROWS = 2048  # queries times heads of one call, so that a block of queries fits a TPU's VMEM
_MOST_GPU_ROWS = 64  # of a KV head: the rows of a wgmma


def union_attention(
    query: jax.Array,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> Attention:
    """`decode_attention` over the union of disjoint segments, which may lie in stores of different precision.

    Differentiable, forward and backward, in memory for logits over the whole stores.

    Args:
      query: [batch, heads, head_dim], or [batch, n, heads, head_dim] for a block of n queries, each of which sees the
        whole of every segment.
      parts: the segments, each with its store; one lane for the same heads in all of them. A store and its segments
        may have fewer rows, a divisor of batch: query rows b * g ... b * g + g - 1 then read its row b.
      scale, implementation, interpret: as in `decode_attention`.

    Returns:
      (out f32 like `query`, lse f32 [batch, heads] or [batch, n, heads]).

    Raises:
      ValueError: a store whose rows do not divide batch; and see `decode_attention`.

    Example:
      out, _ = union_attention(query, [(Store(keys, values), Segments(offsets, lengths)), (tail, Segments(start, n))])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [(store, _begun(query, store, segments)) for store, segments in parts]
    for store, _ in parts:
        if query.shape[0] % store.keys.shape[0]:
            raise ValueError(f"a store of {store.keys.shape[0]} rows cannot be shared by {query.shape[0]} query rows")

    fixed = {"scale": scale, "interpret": interpret}
    implementations = {name: partial(_separately, name, **fixed) for name in ("pallas_tpu", "pallas_gpu", "reference")}
    implementations |= {
        name: partial(_together, name, size, **fixed) for name, size in (("xla", xla.LARGEST), ("xla_wide", xla.WIDE))
    }

    @jax.custom_jvp
    def attend(query: jax.Array, parts: Sequence[Part]) -> Attention:
        return dispatch("decode_attention", implementation, implementations, ORDER, query, parts)

    @attend.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Attention, Attention]:
        """That of the definition, which looks at the whole store: the loops of the others end where segments do."""
        return attend(*primals), jax.jvp(implementations["reference"], primals, tangents)[1]

    return attend(query, list(parts))


def _separately(name: str, query: jax.Array, parts: Sequence[Part], **options: Any) -> Attention:
    return merge([_of_part(name, query, part, **options) for part in parts])


def _together(name: str, largest: int, query: jax.Array, parts: Sequence[Part], **options: Any) -> Attention:
    """All float parts of one query for each of their rows share one softmax."""
    joint = [part for part in parts if part[0].bits is None and _ordinary(query, part)]
    others = [_of_part(name, query, part, **options) for part in parts if not any(part is other for other in joint)]
    if not joint:
        return merge(others)
    scale = options["scale"]
    out, lse = (x[:, 0] for x in xla.decode_attention(query[:, None], joint, scale=scale, largest=largest))
    return merge([(out, lse), *others]) if others else (out, lse)


def _of_part(name: str, query: jax.Array, part: Part, **options: Any) -> Attention:
    store, segments = part

    def attend(query: jax.Array, skip: jax.Array | None = None) -> Attention:
        out, lse = decode_attention(
            query,
            store.keys,
            store.values,
            segments.offsets,
            segments.lengths,
            key_scales=store.key_scales,
            value_scales=store.value_scales,
            bits=store.bits,
            skip=skip,
            implementation=name,
            **options,
        )
        return (rotated(out), lse) if store.rotated else (out, lse)

    if store.rotated:
        query = rotated(query)
    heads, head_dim = query.shape[-2:]
    if _ordinary(query, part):
        return attend(query)
    kv_heads = store.lanes if segments.lengths.shape[1] == 1 else segments.lengths.shape[1]
    most = _MOST_GPU_ROWS * kv_heads // heads if name == "pallas_gpu" else _MOST_ROWS // heads
    block = query.reshape(store.keys.shape[0], -1, heads, head_dim)
    skip = None if segments.skip is None else segments.skip.reshape(block.shape[:2])
    size = -(-block.shape[1] // -(-block.shape[1] // max(1, most)))  # parts of equal size
    out, lse = in_chunks(lambda part, _: attend(*part), (block, skip), size)
    return out.reshape(query.shape), lse.reshape(query.shape[:-1])


def _ordinary(query: jax.Array, part: Part) -> bool:
    return query.ndim == 3 and part[0].keys.shape[0] == query.shape[0]


def _begun(query: jax.Array, store: Store, segments: Segments) -> Segments:
    """Segments of one query each, without what it does not see."""
    if segments.skip is None or not _ordinary(query, (store, segments)):
        return segments
    skip = segments.skip[:, None]
    return Segments(segments.offsets + skip, segments.lengths - skip)
