"""The definition, written from the formula in float32. Materialises length x length."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.attention.mask import Mask


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
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    logits = jnp.where(mask.as_array(query.shape[1])[:, None], logits, -jnp.inf)
    out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v, precision="highest")
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    return out.astype(value.dtype), lse.swapaxes(1, 2) if with_lse else None
