"""cuDNN's flash attention, as JAX offers it."""

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
) -> tuple[jax.Array, None]:
    """See `api.attention`. JAX itself says which head sizes and cards are served (NotImplementedError)."""
    if with_lse:
        raise NotImplementedError("cudnn: JAX rounds its log-sum-exp to half precision: pass with_lse=False")
    if mask.segments is not None:
        raise NotImplementedError("cudnn has no segments: use implementation='xla'")
    if mask.blocks is not None:
        raise NotImplementedError("cudnn has no blocks that see each other: use implementation='xla_wide'")
    if mask.window is not None and not mask.causal:
        raise NotImplementedError("cudnn takes a window of a causal mask only: use implementation='xla_wide'")
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(f"cudnn takes bfloat16 or float16, not {query.dtype}: use implementation='xla'")
    try:
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=mask.causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    except RuntimeError as error:  # JAX without its CUDA plugin
        raise NotImplementedError(f"{error} Use implementation='xla'") from error
    if lengths is None:
        return out, None
    # What cuDNN leaves in padding rows is nowhere promised to be finite.
    true_row = jax.lax.iota(jnp.int32, query.shape[1])[None] < lengths[:, None]
    return jnp.where(true_row[..., None, None], out, 0), None
