"""The public function of the column statistics op."""

import math

import jax

from vlcache_jax.kernels.column_statistics import reference, xla
from vlcache_jax.kernels.column_statistics.types import ColumnStatistics

_IMPLEMENTATIONS = {"xla": xla.column_statistics, "reference": reference.column_statistics}


def column_statistics(
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    count: jax.Array,
    *,
    threshold: float = 0.01,
    scale: float | None = None,
    implementation: str | None = None,
) -> ColumnStatistics:
    """Statistics of the causal attention of rows first .. first + count - 1 with all keys of the prompt.

    With A the attention probabilities (softmax in float32) of query head h, over the rows q of the slice:

        sums[h, j]  = sum_q A[q, j]                                (VL-Cache, arXiv 2410.23317, section 3.2)
        counts[h]   = #{(q, j): j <= q, A[q, j] >= threshold * max_j A[q, j]}           (ibid., equations 1, 2)

    The test needs no probabilities: it is `logit - max logit >= log(threshold)`. The work follows the largest count.

    Args:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      first: i32 [batch], first row of the slice.
      count: i32 [batch], rows in the slice, at least 1; first + count must not pass the true length.
      threshold: relative threshold, in (0, 1].
      scale: factor of the logits, head_dim ** -0.5 by default.
      implementation: "xla" (default: rows in blocks, never rows x length for all heads at once) or "reference".

    Returns:
      ColumnStatistics of sums f32 [batch, heads, length] and counts f32 [batch, heads].

    Raises:
      ValueError: shapes that do not fit together, a threshold out of range, or an unknown implementation.
    """
    batch, length, heads, head_dim = query.shape
    if key.shape[:2] != (batch, length) or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(f"key {key.shape} does not fit query {query.shape}")
    if first.shape != (batch,) or count.shape != (batch,):
        raise ValueError(f"first {first.shape} and count {count.shape} must be [{batch}]")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} must lie in (0, 1]")
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is not one of {sorted(_IMPLEMENTATIONS)}")
    function = _IMPLEMENTATIONS[implementation or "xla"]
    scale = head_dim**-0.5 if scale is None else scale
    return function(query, key, first, count, math.log(threshold), scale)
