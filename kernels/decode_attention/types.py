"""What the implementations are handed."""

import dataclasses

import jax

from vlcache_jax.kernels.precision import PRECISIONS, Coded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Keys and values, float or coded.

    Attributes:
      keys: [batch, lanes, slots, head_dim], or codes.
      values: like `keys`.
      key_scales: what it takes to read codes, see `precision.Coded`; or None.
      value_scales: like `key_scales`.
      bits: the word of the codes' `precision.PRECISIONS` (static); None for a float store.
      segments: how many share a lane (static). One is then a part of the slots on average, which is what kernels tell
        the compiler that they read.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    bits: int | str | None = dataclasses.field(default=None, metadata={"static": True})
    segments: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def lanes(self) -> int:
        """Lanes of a row."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Slots of a lane."""
        return self.keys.shape[2] * self.packing

    @property
    def packing(self) -> int:
        """Slots in a row of `keys`."""
        return 1 if self.bits is None else PRECISIONS[self.bits].spans[0][1]

    @property
    def rotated(self) -> bool:
        """Whether keys and values are `rotation.rotated`: `union_attention` then rotates queries and outputs, too."""
        return self.bits is not None and PRECISIONS[self.bits].rotated

    @property
    def coded(self) -> Coded:
        """Its arrays."""
        return Coded(self.keys, self.values, self.key_scales, self.value_scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Segments:
    """Where the keys of a query are.

    Attributes:
      offsets: i32 [batch, kv_heads or 1].
      lengths: like `offsets`.
      skip: i32 [query rows] or [query rows, n], or None: so many slots at its start a query does not see.
    """

    offsets: jax.Array
    lengths: jax.Array
    skip: jax.Array | None = None
