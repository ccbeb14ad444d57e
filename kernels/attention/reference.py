"""The definition, written from the formula in float32. Materialises length x length."""

import jax
import jax.numpy as jnp


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
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    visible = jnp.tril(jnp.ones(logits.shape[2:], bool))
    visible = visible[None, None]
    if segments is not None:
        row, column = segments[:, None, :, None], segments[:, None, None, :]
        visible = visible & ((column == 0) | (column == row))
    logits = jnp.where(visible, logits, -jnp.inf)
    out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v, precision="highest")
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    return out.astype(value.dtype), lse.swapaxes(1, 2) if with_lse else None
