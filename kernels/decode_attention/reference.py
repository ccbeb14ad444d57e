"""The definition, written from the formula in float32 over the whole store with a mask."""

import jax
import jax.numpy as jnp


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    offsets: jax.Array,
    lengths: jax.Array,
    scale: float,
    max_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`."""
    heads, (lanes, slots) = query.shape[1], keys.shape[1:3]
    offsets = jnp.broadcast_to(offsets, lengths.shape)
    kv_heads = lanes if offsets.shape[1] == 1 else offsets.shape[1]
    lane = jnp.arange(heads) * lanes // heads
    segment = jnp.arange(heads) * kv_heads // heads if offsets.shape[1] > 1 else jnp.zeros(heads, jnp.int32)
    first, length = offsets[:, segment, None], lengths[:, segment, None]  # [batch, heads, 1]
    inside = (jnp.arange(slots) >= first) & (jnp.arange(slots) < first + length)
    k = jnp.where(inside[..., None], keys[:, lane].astype(jnp.float32), 0)
    v = jnp.where(inside[..., None], values[:, lane].astype(jnp.float32), 0)
    logits = scale * jnp.einsum("bhd,bhsd->bhs", query.astype(jnp.float32), k, precision="highest")
    logits = jnp.where(inside, logits, -jnp.inf)
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    weights = jnp.where(inside, jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0)
    return jnp.einsum("bhs,bhsd->bhd", weights, v, precision="highest"), lse
