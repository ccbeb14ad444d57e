"""The result of the column statistics op."""

from typing import NamedTuple

import jax


class ColumnStatistics(NamedTuple):
    """Per query head: sums f32 [batch, heads, length] over the rows, counts f32 [batch, heads] of large entries."""

    sums: jax.Array
    counts: jax.Array
