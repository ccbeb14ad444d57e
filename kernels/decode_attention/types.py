"""What the implementations are handed."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Keys and values, float or quantised.

    Attributes:
      keys: [batch, lanes, slots, head_dim]; codes i8 [batch, lanes, slots * bits / 8, head_dim] of a quantised store.
      values: like `keys`.
      key_scales: f32 [batch, lanes, slots / group, 2, width], or None. See `quantisation.quantise_keys`.
      value_scales: f32 [batch, lanes, 2, slots], or None. See `quantisation.quantise_values`.
      value_channels: f32 [batch, kv_heads, head_dim], by which the values of a quantised store were divided, or None.
        Attention is linear in the values, so `union_attention` multiplies its output; nothing else reads them.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    value_channels: jax.Array | None = None

    @property
    def lanes(self) -> int:
        """Lanes of a row."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Slots of a lane."""
        return self.keys.shape[2] if self.value_scales is None else self.value_scales.shape[3]

    @property
    def packing(self) -> int:
        """Slots in a row of `keys`."""
        return self.slots // self.keys.shape[2]


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
