"""The public function of the attention op."""

from typing import Any

import jax

from vlcache_jax.kernels.attention import cudnn, reference, splash_tpu, xla, xla_wide
from vlcache_jax.kernels.attention.mask import CAUSAL, Mask
from vlcache_jax.kernels.cards import OnCard
from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch

IMPLEMENTATIONS: dict[str, Implementation] = {
    "splash_tpu": splash_tpu.attention,
    "cudnn": cudnn.attention,
    "xla": xla.attention,
    "xla_wide": xla_wide.attention,
    "reference": reference.attention,
}
_ORDER: dict[str, tuple[str | OnCard, ...]] = {
    "tpu": ("splash_tpu", "xla_wide"),
    "cuda": (OnCard("cudnn", (8, 0)), "xla_wide"),
    "default": ("xla",),
}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask = CAUSAL,
    *,
    lengths: jax.Array | None = None,
    scale: float | None = None,
    with_lse: bool = True,
    implementation: str | tuple[str, ...] | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Grouped-query attention of a sequence with itself; softmax in float32. Differentiable.

    Prompts are right-padded, so causality alone keeps padding out of every true row; where the mask is not causal,
    segments must. Padding values must be finite (0 * NaN is NaN), and the outputs of padding rows are finite but mean
    nothing.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim]; heads is a multiple of kv_heads.
      value: like `key`.
      mask: who sees whom; causal by default.
      lengths: i32 [batch], true lengths of the rows, for implementations that can leave the padding out.
      scale: factor of the logits, head_dim ** -0.5 by default.
      with_lse: whether the log-sum-exp is wanted. "splash_tpu" writes 128 numbers for each of them, and has a backward
        kernel only without.
      implementation: None takes the first of the platform's order that serves the arguments. A name is tried alone, a
        tuple of names one after the other:
          "splash_tpu"  JAX's splash attention for TPUs. Causal, with or without a window, with or without blocks
                        (which take it a second pass), or full from 640 tokens on; with segments where they are apart.
                        Its gradient with lse or blocks is that of "xla_wide".
          "cudnn"       cuDNN's flash attention through `jax.nn.dot_product_attention`, for NVIDIA GPUs of compute
                        capability 8.0 and later. Causal (a window too) or full, bfloat16 or float16. A program that
                        holds it can only be made where JAX finds cuDNN, so it is a default only where such a card is
                        attached.
          "xla_wide"    for accelerators: all heads at once, query rows in chunks where there are many.
          "xla"         for CPUs: one head at a time, query rows in chunks.
          "reference"   the definition.
      interpret: for the Pallas implementations, as in `pallas_call`.

    Returns:
      (out, lse): out [batch, length, heads, head_dim] in the dtype of `value`; lse f32 [batch, length, heads], the
      log-sum-exp of the scaled logits of each row, or None without `with_lse`. "cudnn" cannot give it: JAX rounds it to
      the dtype of the output there, too coarse for the probabilities of single entries.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      NotImplementedError: none of the named implementations can serve the arguments.
    """
    batch, length, heads, head_dim = query.shape
    if key.shape != value.shape or key.shape[:2] != (batch, length) or key.shape[3] != head_dim:
        raise ValueError(f"key {key.shape} and value {value.shape} do not fit query {query.shape}")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[2]} KV heads")
    if mask.segments is not None and mask.segments.shape != (batch, length):
        raise ValueError(f"segments {mask.segments.shape} must be [{batch}, {length}]")
    if mask.blocks is not None and mask.blocks.shape != (batch, length):
        raise ValueError(f"blocks {mask.blocks.shape} must be [{batch}, {length}]")
    if mask.places is not None and (mask.segments is None or mask.places.shape != (batch, length)):
        raise ValueError(f"places {mask.places.shape} must be [{batch}, {length}], and beside segments")
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"window={mask.window} hides a token from itself: give at least 1")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths {lengths.shape} must be [{batch}]")
    scale = head_dim**-0.5 if scale is None else scale
    implementations = bound(IMPLEMENTATIONS, interpret, scale=scale, with_lse=with_lse)
    return dispatch("attention", implementation, implementations, _ORDER, query, key, value, mask, lengths)
