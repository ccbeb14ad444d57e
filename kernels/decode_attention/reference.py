"""The definition, written from the formula in float32 over the whole store with a mask."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.decode_attention.types import Segments, Store
from vlcache_jax.kernels.precision import PRECISIONS


def decode_attention(
    query: jax.Array, store: Store, segments: Segments, *, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`; `query` is [batch, n, heads, head_dim]."""
    keys, values = _dequantised(store)
    offsets, lengths = segments.offsets, segments.lengths
    n, heads = query.shape[1:3]
    lanes, slots = keys.shape[1:3]
    kv_heads = lanes if lengths.shape[1] == 1 else lengths.shape[1]
    lane = jax.lax.iota(jnp.int32, heads) * lanes // heads
    segment = (
        jax.lax.iota(jnp.int32, heads) * kv_heads // heads if lengths.shape[1] > 1 else jnp.zeros(heads, jnp.int32)
    )
    first, last = offsets[:, segment, None, None], (offsets + lengths)[:, segment, None, None]  # [batch, heads, 1, 1]
    slot = jax.lax.iota(jnp.int32, slots)[None, None, None]
    hidden = (n - 1 - jax.lax.iota(jnp.int32, n))[None, None, :, None] if causal else 0
    inside = ((slot >= first) & (slot < last))[:, :, 0, :, None]  # [batch, heads, slots, 1]
    skip = 0 if segments.skip is None else segments.skip[:, None, :, None]
    seen = jnp.broadcast_to((slot >= first + skip) & (slot < last - hidden), (*last.shape[:2], n, slots))
    k = jnp.where(inside, keys[:, lane].astype(jnp.float32), 0)
    v = jnp.where(inside, values[:, lane].astype(jnp.float32), 0)
    logits = scale * jnp.einsum("bnhd,bhsd->bhns", query.astype(jnp.float32), k, precision="highest")
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf, where=seen))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - highest, 0)), 0)
    total = jnp.sum(weights, axis=-1)
    empty = total == 0
    some = jnp.where(empty, 1, total)  # without a NaN in derivatives where there is no slot
    lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0, highest[..., 0]) + jnp.log(some))
    out = jnp.einsum("bhns,bhsd->bnhd", weights / some[..., None], v, precision="highest")
    return out, lse.swapaxes(1, 2)


def _dequantised(store: Store) -> tuple[jax.Array, jax.Array]:
    """Keys and values [batch, lanes, slots, head_dim]."""
    if store.bits is None:
        return store.keys, store.values
    if not isinstance(store.bits, int) or store.key_scales is None or store.value_scales is None:
        return PRECISIONS[store.bits].decode(store.coded)
    bits = store.bits  # 8, 4 or 2, once more
    group = 256 // bits
    slot = jax.lax.iota(jnp.int32, store.value_scales.shape[3])
    row = slot // group * 32 + slot % 32
    low_bit = slot % group // 32 * bits

    def codes(packed: jax.Array) -> jax.Array:
        unsigned = (packed.astype(jnp.int32)[:, :, row] % 256 // 2 ** low_bit[None, None, :, None]) % 2**bits
        return jnp.where(unsigned < 2 ** (bits - 1), unsigned, unsigned - 2**bits).astype(jnp.float32)

    key_scales, value_scales = (
        jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)
        for x in (store.key_scales, store.value_scales)
    )
    key_scales = key_scales[:, :, slot // group, :, : store.keys.shape[3]]  # [batch, lanes, slots, 2, head_dim]
    keys = codes(store.keys) * key_scales[:, :, :, 0] + key_scales[:, :, :, 1]
    values = codes(store.values) * value_scales[:, :, 0, :, None] + value_scales[:, :, 1, :, None]
    return keys, values
