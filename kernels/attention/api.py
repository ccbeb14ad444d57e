"""The public function of the prefill attention op."""

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.attention import reference, xla

_IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segments: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention of a prompt with itself; softmax in float32. Differentiable.

    Prompts are right-padded, so causality alone keeps padding out of every true row; padding values must be finite
    (0 * NaN is NaN), and the outputs of padding rows mean nothing.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim]; heads is a multiple of kv_heads.
      value: like `key`.
      segments: i32 [batch, length]. Row t sees column j <= t only if column j is of segment 0 (a shared prefix)
        or of row t's own segment. None: no segments.
      scale: factor of the logits, head_dim ** -0.5 by default.
      implementation: "xla" (default: rows in chunks, never length x length for all heads at once) or "reference".

    Returns:
      (out, lse): out [batch, length, heads, head_dim] in the dtype of `value`; lse f32 [batch, length, heads], the
      log-sum-exp of the scaled logits of each row.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    batch, length, heads, head_dim = query.shape
    if key.shape != value.shape or key.shape[:2] != (batch, length) or key.shape[3] != head_dim:
        raise ValueError(f"key {key.shape} and value {value.shape} do not fit query {query.shape}")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[2]} KV heads")
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is not one of {sorted(_IMPLEMENTATIONS)}")
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    function = _IMPLEMENTATIONS[implementation or "xla"]
    return function(query, key, value, segments, head_dim**-0.5 if scale is None else scale)
