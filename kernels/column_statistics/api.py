"""The public function of the column statistics op."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.column_statistics import pallas_tpu, reference, xla, xla_columns
from vlcache_jax.kernels.column_statistics.types import ColumnStatistics, Options, Rows
from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu.column_statistics,
    "xla": xla.column_statistics,
    "xla_columns": xla_columns.column_statistics,
    "reference": reference.column_statistics,
}
_ORDER = {"tpu": ("pallas_tpu", "xla_columns"), "cuda": ("xla_columns",), "default": ("xla",)}


def column_statistics(
    query: jax.Array,
    key: jax.Array,
    first: jax.Array,
    count: jax.Array,
    *,
    last: jax.Array | None = None,
    lse: jax.Array | None = None,
    maximum: jax.Array | None = None,
    max_rows: int | None = None,
    threshold: float | None = 0.01,
    column_maximum: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> ColumnStatistics:
    """Statistics of the causal attention of rows first .. first + count - 1 with all keys of the prompt.

    With A the attention probabilities (softmax in float32) of query head h, over the rows q of the slice:

        sums[h, j]  = sum_q A[q, j]                                (VL-Cache, arXiv 2410.23317, section 3.2)
        counts[h]   = #{(q, j): j <= q, A[q, j] >= threshold * max_j A[q, j]}           (ibid., equations 1, 2)

    The test needs no probabilities: it is `logit - max logit >= log(threshold)`. Nothing of rows x length for all heads
    is made. The keys are read once if `lse` (and `maximum`, where there is a threshold) is given, otherwise twice. Rows
    outside the slice, and the columns after it, may hold anything, NaN included.

    Args:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      first: i32 [batch], first row of the slice.
      count: i32 [batch], rows in the slice; 0 is allowed. first + count must not pass the true length.
      last: i32 [batch, length], the last column that each row sees, where that may be one after its own
        (`Mask.last`). A row's attention, and what counts, reaches to there; those columns are looked at.
      lse: f32 [batch, length, heads], as prefill attention returns it; computed if None.
      maximum: f32, like `lse`: the largest logit of each row.
      max_rows: static bound on `count`, which saves memory and, on accelerators, work; rows beyond it are left out.
        None: as many as the prompt has.
      threshold: relative threshold, in (0, 1]; None counts nothing.
      column_maximum: also return the largest probability in each column.
      scale: factor of the logits, head_dim ** -0.5 by default.
      implementation: None takes the first of the platform's order that serves the arguments; or one of "pallas_tpu",
        "xla" (rows in blocks; the work follows the largest count), "xla_columns" (columns in blocks, all heads at once:
        for GPUs) and "reference".
      interpret: for the Pallas implementations, as in `pallas_call`.

    Returns:
      See `ColumnStatistics`.

    Raises:
      ValueError: shapes that do not fit together, a bound or threshold out of range, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve the arguments.
    """
    batch, length, heads, head_dim = query.shape
    if key.shape[:2] != (batch, length) or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(f"key {key.shape} does not fit query {query.shape}")
    if first.shape != (batch,) or count.shape != (batch,):
        raise ValueError(f"first {first.shape} and count {count.shape} must be [{batch}]")
    for name, value in (("lse", lse), ("maximum", maximum)):
        if value is not None and value.shape != (batch, length, heads):
            raise ValueError(f"{name} {value.shape} must be [{batch}, {length}, {heads}], one for each query")
    if last is not None and last.shape != (batch, length):
        raise ValueError(f"last {last.shape} must be [{batch}, {length}], one for each row")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}: give at least 1, or None for no bound")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} must lie in (0, 1]")
    first, count = first.astype(jnp.int32), count.astype(jnp.int32)
    if max_rows is None or max_rows >= length:
        # With a bound the statistics start at the slice's first row, also when it is no bound at all.
        rows = Rows(jnp.zeros_like(first), first, first + count, last)
        if max_rows is not None:
            query, lse, maximum, rows = _slice(query, lse, maximum, last, first, count, length)
    else:
        count = jnp.minimum(count, max_rows)
        query, lse, maximum, rows = _slice(query, lse, maximum, last, first, count, max_rows)
    options = Options(
        scale=head_dim**-0.5 if scale is None else scale,
        log_threshold=None if threshold is None else math.log(threshold),
        column_maximum=column_maximum,
    )
    implementations = bound(IMPLEMENTATIONS, interpret, options)
    return dispatch("column_statistics", implementation, implementations, _ORDER, query, key, rows, lse, maximum)


def _slice(query, lse, maximum, last, first, count, size):
    """The rows of the slice, moved to the front; rows past the prompt's end repeat its last one and do not count."""
    index = jnp.minimum(first[:, None] + jax.lax.iota(jnp.int32, size)[None], query.shape[1] - 1)

    def take(x):
        return None if x is None else jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    return take(query), take(lse), take(maximum), Rows(first, jnp.zeros_like(first), count, take(last))
