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
      width: bits of a number's code; where keys and values differ, on average.
      rotated: whether keys and values are rotated before they are coded (`kernels.rotation`).
      group: slots that are coded together, a power of two up to 128; all spans divide it.
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
    rotated: bool = False
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
    """8, 4 or 2 bits: rotated, keys scaled per channel and group, values per token (`kernels.quantisation`).

    Keys and values may have different numbers of bits.
    """

    rotated = True

    def __init__(self, key_bits: int, value_bits: int) -> None:
        self.bits = key_bits, value_bits
        groups = [quantisation.group_size(bits) for bits in self.bits]
        self.group, self.width = max(groups), sum(self.bits) // 2
        self.spans = ((2, 8 // key_bits), (2, 8 // value_bits), (2, groups[0]), (3, 1))

    def encode(self, keys: jax.Array, values: jax.Array, valid: jax.Array) -> Coded:
        key_codes, key_scales = quantisation.quantise_keys(keys, self.bits[0], valid)
        value_codes, value_scales = quantisation.quantise_values(values, self.bits[1], valid)
        return Coded(key_codes, value_codes, key_scales, value_scales)

    def decode(self, coded: Coded) -> tuple[jax.Array, jax.Array]:
        keys = quantisation.dequantise_keys(coded.keys, coded.key_scales, self.bits[0])
        return keys, quantisation.dequantise_values(coded.values, coded.value_scales, self.bits[1])


class Float8(Precision):
    """float8_e4m3fn: keys scaled per channel and group of 32 tokens, values per token.

    A scale takes the largest entry to 448, the format's largest number; three bits of fraction stay, for small entries
    as for large ones, where the 8 bits of `Integers` have steps of one size. Plain XLA reads it on every platform; the
    Pallas kernels decline.
    """

    width, group, spans = 8, 32, ((2, 1), (2, 1), (2, 32), (2, 1))
    _largest = float(jnp.finfo(jnp.float8_e4m3fn).max)

    def encode(self, keys: jax.Array, values: jax.Array, valid: jax.Array) -> Coded:
        """See `Precision.encode`; scales f32 [batch, lanes, slots / 32, head_dim] and [batch, lanes, slots]."""
        keys, values = (jnp.where(valid[..., None], x.astype(jnp.float32), 0) for x in (keys, values))
        groups = keys.reshape(*keys.shape[:-2], -1, self.group, keys.shape[-1])
        key_codes, key_scales = self._scaled(groups, -2)
        value_codes, value_scales = self._scaled(values, -1)
        return Coded(key_codes.reshape(keys.shape), value_codes, key_scales[..., 0, :], value_scales[..., 0])

    def decode(self, coded: Coded) -> tuple[jax.Array, jax.Array]:
        keys = coded.keys.astype(jnp.float32)
        groups = keys.reshape(*keys.shape[:-2], -1, self.group, keys.shape[-1])
        keys = (groups * coded.key_scales[..., None, :]).reshape(keys.shape)
        return keys, coded.values.astype(jnp.float32) * coded.value_scales[..., None]

    def _scaled(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        scale = jnp.max(jnp.abs(x), axis, keepdims=True) / self._largest
        codes = jnp.clip(x / jnp.where(scale == 0, 1, scale), -self._largest, self._largest)
        return codes.astype(jnp.float8_e4m3fn), scale


PRECISIONS: dict[int | str, Precision] = {
    **{bits: Integers(bits, bits) for bits in quantisation.BITS},
    "4/2": Integers(4, 2),
    "float8": Float8(),
}
"""By the word that `Policy.bits` gives; "4/2" has keys of 4 bits and values of 2."""
