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
      blocks: i32 [batch, length], or None. Consecutive tokens of the same block, a number from 0 on, see each other
        whatever their order: an image, or a prefix of the prompt. Others, -1 say, are in none.
      window: row t sees no column before t - window + 1, not even of its block: so many tokens, itself included.
      places: i32 [batch, length], or None. Numbers by which the window counts, in the stead of t and of the column's
        index: of a token in its own text, where segments pack several into a row (`places_of`).

    Example:
      >>> Mask().as_array(3)[0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
      >>> Mask(window=2, blocks=jnp.asarray([[-1, 0, 0, -1]])).as_array(4)[0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    segments: jax.Array | None = None
    apart: bool = dataclasses.field(default=False, metadata={"static": True})
    blocks: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    places: jax.Array | None = None

    @property
    def full(self) -> bool:
        """Whether every row sees every column."""
        return not self.causal and self.segments is None and self.window is None

    @property
    def triangular(self) -> bool:
        """Whether no row sees a column after its own."""
        return self.causal and self.blocks is None

    def span(self, first: int, last: int, length: int) -> tuple[int, int]:
        """All columns that the rows first .. last - 1 of a sequence see lie between these two, the second excluded."""
        start = 0 if self.window is None or self.places is not None else max(0, first - self.window + 1)
        return start, min(last, length) if self.triangular else length

    def last(self) -> jax.Array | None:
        """i32 [batch, length]: the last column that each row sees, where blocks let it see any after its own."""
        if self.blocks is None:
            return None
        length = self.blocks.shape[1]
        index = jax.lax.iota(jnp.int32, length)[None]
        follows = jnp.pad(self.blocks[:, 1:] == self.blocks[:, :-1], ((0, 0), (0, 1))) & (self.blocks >= 0)
        return jax.lax.cummin(jnp.where(follows, length, index), axis=1, reverse=True)

    def first(self) -> jax.Array | None:
        """i32 [batch, length]: the first row that sees each column, where blocks let any before its own."""
        if self.blocks is None:
            return None
        index = jax.lax.iota(jnp.int32, self.blocks.shape[1])[None]
        follows = jnp.pad(self.blocks[:, 1:] == self.blocks[:, :-1], ((0, 0), (1, 0))) & (self.blocks >= 0)
        return jax.lax.cummax(jnp.where(follows, 0, index), axis=1)

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

        def pairs(x: jax.Array) -> tuple[jax.Array, jax.Array]:  # [batch, r, 1] and [batch, 1, c]
            of_row, of_column = (jnp.take(x, index, axis=1, mode="clip") for index in (rows, columns))
            return of_row[..., None], of_column[:, None]

        if self.blocks is not None:
            of_row, of_column = pairs(self.blocks)
            seen = seen | ((of_row == of_column) & (of_row >= 0))
        if self.segments is not None:
            of_row, of_column = pairs(self.segments)
            own = of_column == of_row
            seen = seen & (own if self.apart else own | (of_column == 0))
        if self.window is None:
            return seen
        of_row, of_column = (row[None], column[None]) if self.places is None else pairs(self.places)
        return seen & (of_column > of_row - self.window)


def places_of(segments: jax.Array) -> jax.Array:
    """`Mask.places` of rows that begin with what all segments see (0), behind which each segment is one run.

    Example:
      >>> places_of(jnp.asarray([[0, 0, 1, 1, 1, 2, 2]]))[0].tolist()
      [0, 1, 2, 3, 4, 2, 3]
    """
    index = jax.lax.iota(jnp.int32, segments.shape[1])[None]
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    prefix = jnp.argmax(segments != 0, axis=1).astype(jnp.int32)[:, None]
    return jnp.where(segments == 0, index, prefix + index - start)


CAUSAL = Mask()
"""Every token sees itself and those before it."""
FULL = Mask(causal=False)
"""Every token sees all others, as in a vision tower."""
