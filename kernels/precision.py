"""Precisions of stores: how keys and values are written, by the word that names one. A new one is an entry."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.kernels import quantisation

Span = tuple[int, int]


class Coded(NamedTuple):
    """What a store holds: codes of keys and values, and what it takes to read them (None where there is no such)."""

    keys: Any
    values: Any
    key_scales: Any = None
    value_scales: Any = None


class Precision:
    """How keys and values are coded. Plain XLA and the reference read any; a kernel declines those it does not know.

    Attributes:
      width: bits of a number's code.
      group: slots that are coded together, a power of two up to 128.
      spans: of each array of `Coded`, along which axis of [batch, lanes, ...] the slots lie and how many are in an
        entry; None for scales that there are none of.

    Example:
      class Half(Precision):
          width, group, spans = 16, 1, ((2, 1), (2, 1), None, None)

          def encode(self, keys, values, valid):
              return Coded(keys.astype("float16"), values.astype("float16"))

          def decode(self, coded):
              return coded.keys.astype("float32"), coded.values.astype("float32")

      PRECISIONS["half"] = Half()  # and then vlc.VLCache(0.1, bits="half")
    """

    width: int
    group: int
    spans: tuple[Span, Span, Span | None, Span | None]

    def encode(self, keys: jax.Array, values: jax.Array, valid: jax.Array) -> Coded:
        """From [batch, lanes, slots, head_dim]; slots without `valid` [batch, lanes, slots] may hold anything."""
        raise NotImplementedError

    def decode(self, coded: Coded) -> tuple[jax.Array, jax.Array]:
        """Keys and values, f32 [batch, lanes, slots, head_dim]; leading axes may be any."""
        raise NotImplementedError

    def shapes(self, shape: tuple[int, ...]) -> Coded:
        """Abstract arrays that code [batch, lanes, slots, head_dim]; slots a multiple of the group."""
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(self.encode, x, x, jax.ShapeDtypeStruct(shape[:-1], jnp.bool_))


class Integers(Precision):
    """8, 4 or 2 bits: keys scaled per channel and group, values per token (`kernels.quantisation`)."""

    def __init__(self, width: int) -> None:
        packing, self.group, self.width = 8 // width, quantisation.group_size(width), width
        self.spans = ((2, packing), (2, packing), (2, self.group), (3, 1))

    def encode(self, keys: jax.Array, values: jax.Array, valid: jax.Array) -> Coded:
        """See `Precision.encode`."""
        key_codes, key_scales = quantisation.quantise_keys(keys, self.width, valid)
        value_codes, value_scales = quantisation.quantise_values(values, self.width, valid)
        return Coded(key_codes, value_codes, key_scales, value_scales)

    def decode(self, coded: Coded) -> tuple[jax.Array, jax.Array]:
        """See `Precision.decode`."""
        keys = quantisation.dequantise_keys(coded.keys, coded.key_scales, self.width)
        return keys, quantisation.dequantise_values(coded.values, coded.value_scales, self.width)


PRECISIONS: dict[int | str, Precision] = {bits: Integers(bits) for bits in quantisation.BITS}
"""By the word that `Policy.bits` gives."""
