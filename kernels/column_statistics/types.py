"""The result of the column statistics op."""

from typing import NamedTuple

import jax


class ColumnStatistics(NamedTuple):
    """Per query head: sums f32 [batch, heads, length] over the rows, counts f32 [batch, heads] of large entries.

    Counts are exact below 2 ** 24 and rounded like any float32 above.
    """

    sums: jax.Array
    counts: jax.Array
