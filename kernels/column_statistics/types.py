"""Arguments and result of the column statistics op."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ColumnStatistics(NamedTuple):
    """What the rows of the slice say about the columns, per query head.

    The row statistics lie at index i for prompt row first + i if `max_rows` was given, for prompt row i if it was not;
    they are -inf outside the slice.

    Attributes:
      sums: f32 [batch, heads, length], sum of the probabilities over the rows.
      counts: f32 [batch, heads], number of large entries; None without a threshold. Exact below 2 ** 24, and rounded
        like any float32 above.
      lse: f32 [batch, rows, heads], log-sum-exp of the logits of each row.
      maximum: f32 [batch, rows, heads], the largest logit of each row; None if it was neither given nor needed.
      column_maximum: f32 [batch, heads, length], the largest probability over the rows; None unless asked for.
    """

    sums: jax.Array
    counts: jax.Array | None
    lse: jax.Array
    maximum: jax.Array | None = None
    column_maximum: jax.Array | None = None

    def of_columns(self, count: int) -> "ColumnStatistics":
        """Those of the first `count` columns; what is said of rows stays."""
        largest = None if self.column_maximum is None else self.column_maximum[..., :count]
        return self._replace(sums=self.sums[..., :count], column_maximum=largest)


class Rows(NamedTuple):
    """Which rows the query array holds: index i is prompt row start + i, and counts if low <= i < high. i32 [batch].

    `last`, i32 [batch, rows]: the last column that a row sees; None: its own.
    """

    start: jax.Array
    low: jax.Array
    high: jax.Array
    last: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for; static.

    Attributes:
      scale: factor of the logits.
      log_threshold: an entry counts if its logit is at least the row's largest plus this; None counts nothing.
      column_maximum: whether it is wanted.
    """

    scale: float
    log_threshold: float | None
    column_maximum: bool


def spread(rows: Rows, values: jax.Array) -> jax.Array:
    """Masks row statistics [batch, rows, heads]: -inf outside the slice."""
    index = jax.lax.iota(jnp.int32, values.shape[1])[None]
    inside = (index >= rows.low[:, None]) & (index < rows.high[:, None])
    return jnp.where(inside[..., None], values, -jnp.inf)
