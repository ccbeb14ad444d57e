"""The attention that patches get in one layer of a tower, beside its features: for what chooses among visual tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.kernels.attention import FULL
from vlcache_jax.models.linear import Linear
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels


def patch_attention(
    config: VisionConfig, layer: Any, hidden: jax.Array, class_token: bool
) -> tuple[jax.Array, jax.Array]:
    """What patches get of the class token, or, without one, of all patches on the average; and their keys.

    Args:
      config: of the tower.
      layer: parameters of one layer (`encoder`).
      hidden: [images, tokens, D], as it enters the layer.
      class_token: whether the first token is one.

    Returns:
      (f32 [images, patches], averaged over heads; [images, patches, head_dim], likewise).
    """
    images, tokens, channels = hidden.shape
    dtype = hidden.dtype
    norm = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, parent=None)
    with jax.numpy_dtype_promotion("standard"):
        x = norm.apply({"params": layer["norm_1"]}, hidden)

    def heads(name: str) -> jax.Array:
        dense = Linear(channels, config.qkv_bias, dtype, parent=None)
        y: Any = dense.apply({"params": layer["attention"][name]}, x)
        return y.reshape(images, tokens, config.num_heads, -1)

    query, key = heads("query"), heads("key")
    if class_token:
        scale = query.shape[-1] ** -0.5
        logits = jnp.einsum("nhd,nshd->nhs", query[:, 0], key, preferred_element_type=jnp.float32) * scale
        attention = jax.nn.softmax(logits, axis=-1)
        return jnp.mean(attention, axis=1)[:, 1:], jnp.mean(key[:, 1:], axis=2)
    _, lse = ops.attention(Kernels(), query, key, key, mask=FULL, with_lse=True)
    all_rows = jnp.zeros((images,), jnp.int32), jnp.full((images,), tokens, jnp.int32)
    last = jnp.full((images, tokens), tokens - 1, jnp.int32)
    sums = ops.column_statistics(Kernels(), query, key, *all_rows, lse, last, threshold=None).sums
    return jnp.mean(sums, axis=1) / tokens, jnp.mean(key, axis=2)
