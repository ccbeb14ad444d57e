"""Who sees whom: one value for every op that has a mask."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Which columns (keys) each row (query) of a sequence sees: what `as_array` says, nothing else.

    A pytree: `causal` is part of the program, the arrays are data. A rule that joins it (a window, a prefix, images
    whose tokens see each other) is one more attribute and one more line of `between`; an implementation that does not
    know it declines.

    Attributes:
      causal: row t sees no column after t.
      segments: i32 [batch, length], or None. Row t sees column j only if j is of segment 0 (a shared prefix) or of row
        t's own segment.

    Example:
      >>> Mask().as_array(3)[0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    segments: jax.Array | None = None

    @property
    def full(self) -> bool:
        """Whether every row sees every column."""
        return not self.causal and self.segments is None

    def as_array(self, length: int) -> jax.Array:
        """bool [batch or 1, length, length]: whether a row sees a column."""
        index = jax.lax.iota(jnp.int32, length)
        return self.between(index, index)

    def between(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """The part of `as_array` of some rows and columns, i32 [r] and [c] -> bool [batch or 1, r, c].

        Rows beyond the sequence, which fill up a block, see what its last one sees, or more.
        """
        row, column = rows[:, None], columns[None]
        seen = (column <= row if self.causal else jnp.ones((rows.size, columns.size), bool))[None]
        if self.segments is not None:
            of_row, of_column = (jnp.take(self.segments, x, axis=1, mode="clip") for x in (rows, columns))
            seen = seen & ((of_column == 0)[:, None] | (of_column[:, None] == of_row[..., None]))
        return seen


CAUSAL = Mask()
"""Every token sees itself and those before it."""
FULL = Mask(causal=False)
"""Every token sees all others, as in a vision tower."""
