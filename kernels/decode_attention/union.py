"""Attention over several segments at once: the kept prompt and the generated tokens, say."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.decode_attention import xla
from vlcache_jax.kernels.decode_attention.api import decode_attention
from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.dispatch import dispatch
from vlcache_jax.kernels.merge import merge

Part = tuple[Store, Segments]

_ORDER = {"tpu": ("pallas_tpu", "xla"), "default": ("xla",)}


def union_attention(
    query: jax.Array,
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` over the union of disjoint segments, which may lie in stores of different precision.

    Args:
      query: [batch, heads, head_dim].
      parts: the segments, each with its store; one lane for the same heads in all of them.
      scale, implementation, interpret: as in `decode_attention`.

    Returns:
      (out f32 [batch, heads, head_dim], lse f32 [batch, heads]).

    Example:
      out, _ = union_attention(query, [(Store(keys, values), Segments(offsets, lengths)), (tail, Segments(start, n))])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def separately(name: str, query: jax.Array, parts: Sequence[Part]) -> tuple[jax.Array, jax.Array]:
        def one(store: Store, segments: Segments) -> tuple[jax.Array, jax.Array]:
            out, lse = decode_attention(
                query,
                store.keys,
                store.values,
                segments.offsets,
                segments.lengths,
                key_scales=store.key_scales,
                value_scales=store.value_scales,
                scale=scale,
                implementation=name,
                interpret=interpret,
            )
            if store.value_channels is not None:
                out *= jnp.repeat(store.value_channels, out.shape[1] // store.value_channels.shape[1], axis=1)
            return out, lse

        return merge([one(*part) for part in parts])

    def together(query: jax.Array, parts: Sequence[Part]) -> tuple[jax.Array, jax.Array]:
        if any(store.key_scales is not None for store, _ in parts):
            return separately("xla", query, parts)
        return xla.decode_attention(query, parts, scale=scale)

    implementations = {name: partial(separately, name) for name in ("pallas_tpu", "reference")} | {"xla": together}
    return dispatch(implementation, implementations, _ORDER, query, list(parts))
