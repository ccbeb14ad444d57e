"""Seeds of any kind as Threefry keys, and the numbers drawn from them.

No setting of JAX has a part in it: not the default PRNG (whose draws may depend on the rest of the batch), not 64-bit
mode, not how JAX splits a draw over devices. A key is two u32 words, high and low, as `jax.random.key(seed)` makes it
by default; number i of a key is the key hashed with i, as `jax.random.bits` does by default.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError

IMPLEMENTATION = "threefry2x32"

Seeds = int | Sequence[int] | jax.Array | np.ndarray
"""What a user may give; see `seed_words`."""

Words = jax.Array | np.ndarray
"""u32 [..., 2]."""


def seed_words(seeds: Any, shape: tuple[int, ...], samples: int | None = None, what: str | None = None) -> Words:
    """The keys that seeds mean.

    Args:
      seeds: one, or an array or a sequence of them that broadcasts to `shape`. A seed is an integer from -2 ** 63 to
        2 ** 64 - 1, modulo 2 ** 64, or a key of `jax.random.key`, of any implementation. Keys of the old style, u32
        [..., 2] or [..., 4], are known by their shape.
      shape: of the answers.
      samples: a single seed stands for seed, seed + 1, ... along the last axis of `shape`, which has this size.
      what: of which there are so many, for the message.

    Returns:
      u32 [*shape, 2]; in numpy where the seeds are.

    Raises:
      InputError: anything else, or an array that could be old-style keys as well as integers.

    Example:
      >>> seed_words([7, -1], (2,)).tolist()
      [[0, 7], [4294967295, 4294967295]]
    """
    words = _as_words(seeds, shape)
    if samples is not None and words.ndim == 1:
        words = _following(words if isinstance(words, jax.Array) else jax.device_put(words), samples)
    try:
        np.broadcast_shapes(words.shape[:-1], shape)
        return (np if isinstance(words, np.ndarray) else jnp).broadcast_to(words, (*shape, 2))
    except ValueError:
        given = np.shape(seeds) if not hasattr(seeds, "shape") else seeds.shape
        raise InputError(
            f"seeds of shape {given} do not fit {what or _answers(shape)}: give one integer or key, or one for each"
        ) from None


def _answers(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} rows" if len(shape) == 1 else f"answers of shape {shape}"


def _as_words(seeds: Any, shape: tuple[int, ...]) -> Words:
    if isinstance(seeds, list | tuple):
        parts = [_as_words(seed, ()) for seed in seeds]
        if not parts or len({part.shape for part in parts}) > 1:
            raise InputError(f"seeds={_shown(seeds)}: give one integer or key, or one for each answer")
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.stack(parts)
        return jnp.stack([part if isinstance(part, jax.Array) else jax.device_put(part) for part in parts])
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if not -(2**63) <= seeds < 2**64:
            raise InputError(f"seeds={seeds} is out of range: give integers from -2**63 to 2**64 - 1")
        return np.array([seeds >> 32 & 0xFFFFFFFF, seeds & 0xFFFFFFFF], np.uint32)
    dtype = getattr(seeds, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _key_words(jax.random.key_data(seeds))
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"seeds={_shown(seeds)}: give integers, or keys of jax.random.key")
    if dtype == jnp.uint32 and seeds.shape[-1:] in ((2,), (4,)) and _fits(seeds.shape[:-1], shape):
        if not _fits(seeds.shape, shape):
            return _key_words(seeds)
        if isinstance(seeds, jax.Array):
            raise InputError(
                f"seeds of uint32 {seeds.shape} for {_answers(shape)} could be integers or a key of the old style: "
                "give seeds.astype(int), or a key from jax.random.key or jax.random.wrap_key_data"
            )
    if isinstance(seeds, jax.Array):
        return _array_words(seeds)
    number = np.asarray(seeds)
    number = number.astype(np.int64 if number.dtype.kind == "i" else np.uint64).view(np.uint64)
    return np.stack([number >> np.uint64(32), number & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def _fits(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(own, shape) == shape
    except ValueError:
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}... ({type(value).__name__})"


@jax.jit
def _array_words(seeds: jax.Array) -> jax.Array:
    wide = seeds.dtype.itemsize == 8
    high = (seeds >> 32 if wide else seeds >> (8 * seeds.dtype.itemsize - 1)).astype(jnp.int32)  # 0 or -1: the sign
    if not wide and jnp.issubdtype(seeds.dtype, jnp.unsignedinteger):
        high = jnp.zeros_like(high)
    return jnp.stack([high.astype(jnp.uint32), seeds.astype(jnp.uint32)], axis=-1)


def _key_words(data: Words) -> Words:
    """Two words of a key of any implementation: what a Threefry key consists of, or a hash of a longer one."""
    if data.shape[-1] == 2:
        return data
    return _hashed(data if isinstance(data, jax.Array) else jax.device_put(data))


@jax.jit
def _hashed(data: jax.Array) -> jax.Array:
    words = data[..., :2]
    for i in range(2, data.shape[-1]):
        words = jax.random.key_data(_folded(_keys(words), data[..., i]))
    return words


@partial(jax.jit, static_argnames="count")
def _following(words: jax.Array, count: int) -> jax.Array:
    """The `count` numbers of 64 bits from one on, u32 [2] -> u32 [count, 2]."""
    low = words[1] + jax.lax.iota(jnp.uint32, count)
    return jnp.stack([words[0] + (low < words[1]).astype(jnp.uint32), low], axis=-1)


def _keys(words: Words) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(words), impl=IMPLEMENTATION)


_folded = jnp.vectorize(jax.random.fold_in)


def random_bits(words: Words, path: tuple[Any, ...], count: int) -> jax.Array:
    """Random numbers that depend on their key, the path and their index alone: number i is the same for every count.

    Args:
      words: u32 [2], one of `seed_words`.
      path: integers, traced or not, such as the index of a step or a layer.
      count: how many.

    Returns:
      u32 [count].
    """
    key = _keys(words)
    for part in path:
        key = jax.random.fold_in(key, part)
    numbers = jax.vmap(partial(jax.random.fold_in, key))(jax.lax.iota(jnp.uint32, count))
    high, low = jnp.unstack(jax.random.key_data(numbers), axis=-1)
    return high ^ low


def uniform(bits: jax.Array) -> jax.Array:
    """f32 in [0, 1) from u32 bits, equal to what `jax.random.uniform` makes of them."""
    one = jnp.uint32(0x3F800000)  # 1.0, whose mantissa the bits become
    return jax.lax.bitcast_convert_type(one | bits >> 9, jnp.float32) - 1
