"""The public function of the decode attention op."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.cards import OnCard
from vlcache_jax.kernels.decode_attention import pallas_gpu, pallas_tpu, reference, xla
from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch
from vlcache_jax.kernels.precision import PRECISIONS, Coded

ORDER: dict[str, tuple[str | OnCard, ...]] = {
    "tpu": ("pallas_tpu", "xla"),
    "cuda": (OnCard("pallas_gpu", (9, 0), (10, 0)), "xla_wide"),
    "default": ("xla",),
}


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    offsets: jax.Array,
    lengths: jax.Array,
    *,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    bits: int | str | None = None,
    scale: float | None = None,
    causal: bool = False,
    skip: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of one query per row, or a few, over one segment per (row, KV head) of a packed store.

        keys[b, lane]:   | layer 0 ....... | layer 1 .. free | layer 2 ............ free |
                                           ^ offsets[b, h]
                                           <-------> lengths[b, h]

    Only the slots of the segments count: the rest of the store may hold anything, NaN included. The work follows
    the segments (on a TPU each, elsewhere the longest), not the size of the store. KV head h lies in lane
    `h * lanes // kv_heads`.

    A segment may start at any slot. (Stores align theirs, so that no kernel reads more than it needs.)

    Args:
      query: [batch, heads, head_dim], or [batch, n, heads, head_dim] for a block of n queries.
      keys: [batch, lanes, slots, head_dim]; of a store of codes as `precision.PRECISIONS[bits]` says.
      values: like `keys`.
      offsets: i32 [batch, kv_heads], or [batch, 1] if the heads of a row share one segment. First slot.
      lengths: i32, like `offsets`. Number of slots; 0 is allowed.
      key_scales: what it takes to read codes of keys (`precision.Coded`), or None.
      value_scales: like `key_scales`.
      bits: the word of the codes' precision, 8, 4 or 2 say; None for a float store.
      scale: factor of the logits, head_dim ** -0.5 by default.
      causal: the block's own tokens are the last n of the segment, so query i does not see the last n - 1 - i slots.
        Otherwise every query sees the whole segment.
      skip: i32 [batch, n], or None: so many slots at its start query i does not see. Plain XLA and the reference only.
      implementation: "xla", "xla_wide" (larger blocks, for GPUs), "pallas_tpu", "pallas_gpu" or "reference"; None takes
        the best of the platform.
      interpret: runs the Pallas implementation that was named in an interpreter: True, or Pallas' own parameters.

    Returns:
      (out f32 like `query`, lse f32 [batch, heads] or [batch, n, heads]). A query that sees no slot gets 0 and -inf.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve the arguments.
    """
    single = query.ndim == 3
    if query.ndim not in (3, 4):
        raise ValueError(f"query {query.shape}: want [batch, heads, head_dim] or [batch, n, heads, head_dim]")
    if single:
        query = query[:, None]
    store, segments = Store(keys, values, key_scales, value_scales, bits=bits), Segments(offsets, lengths, skip)
    _check(query, store, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    implementations = bound(IMPLEMENTATIONS, interpret, scale=scale, causal=causal and query.shape[1] > 1)
    out, lse = dispatch("decode_attention", implementation, implementations, ORDER, query, store, segments)
    return (out[:, 0], lse[:, 0]) if single else (out, lse)


def _xla(query: jax.Array, store: Store, segments: Segments, **options: Any) -> tuple[jax.Array, jax.Array]:
    return xla.decode_attention(query, [(store, segments)], **options)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu.decode_attention,
    "pallas_gpu": pallas_gpu.decode_attention,
    "xla": _xla,
    "xla_wide": partial(_xla, largest=xla.WIDE),
    "reference": reference.decode_attention,
}


def _check(query: jax.Array, store: Store, segments: Segments) -> None:
    batch, _, heads, head_dim = query.shape
    keys, values, offsets, lengths = store.keys, store.values, segments.offsets, segments.lengths
    lanes = keys.shape[1]
    apart = store.bits is not None and values.shape[3:] == keys.shape[3:]  # keys and values may be coded differently
    if not (keys.shape == values.shape or apart) or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(f"keys {keys.shape} and values {values.shape} do not fit query {query.shape}")
    if lengths.ndim != 2 or lengths.shape[0] != batch or offsets.shape != lengths.shape:
        raise ValueError(f"offsets {offsets.shape}, lengths {lengths.shape}: want two of [{batch}, kv_heads or 1]")
    kv_heads = lanes if lengths.shape[1] == 1 else lengths.shape[1]
    if heads % kv_heads or kv_heads % lanes:
        raise ValueError(f"{heads} query heads, {kv_heads} KV heads and {lanes} lanes do not divide one another")
    _check_scales(store)


def _check_scales(store: Store) -> None:
    if store.bits not in (None, *PRECISIONS):
        raise ValueError(f"bits={store.bits!r} is not one of {list(PRECISIONS)}")
    dtype, shape = store.keys.dtype, store.keys.shape
    if store.bits is None:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"a store of {dtype} holds codes: give their bits")
        wanted = store.coded._replace(key_scales=None, value_scales=None)
    elif store.slots % PRECISIONS[store.bits].group:
        raise ValueError(f"{store.slots} slots are not a multiple of {PRECISIONS[store.bits].group}")
    else:
        wanted = PRECISIONS[store.bits].shapes((*shape[:2], store.slots, shape[3]))
    given, expected = ([x is not None for x in coded[2:]] for coded in (store.coded, wanted))
    if given != expected:
        raise ValueError(f"a store of {dtype} wants {('no', 'one of the', 'both')[sum(expected)]} scales")
    for name, x, like in zip(Coded._fields, store.coded, wanted):
        if x is not None and (x.shape, x.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} {x.dtype} {x.shape} do not fit codes {shape} of bits={store.bits!r}")
