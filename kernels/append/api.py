"""The public function of the append op."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.append import pallas_tpu, reference, xla
from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu.append,
    "xla": xla.append,
    "reference": reference.append,
}
_ORDER = {"tpu": ("pallas_tpu", "xla"), "default": ("xla",)}

Buffers = tuple[jax.Array, ...]


def append(
    buffers: Sequence[jax.Array],
    new: Sequence[jax.Array],
    slots: jax.Array,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> Buffers:
    """Writes a token of every row into buffers, in place where they are not used again.

        buffer[0, h]   | a b c . . . . . |        slots[0] = 3
        buffer[1, h]   | a b c d e . . . |        slots[1] = 5

    Differentiable.

    Args:
      buffers: [rows, heads, slots, width] each, of a number of heads and a width of its own: keys and values, say.
      new: [rows, heads, width] for each buffer; cast to its type.
      slots: i32 [rows], from 0 to slots - 1.
      implementation: "pallas_tpu", "xla" or "reference"; None takes the best of the platform.
      interpret: runs "pallas_tpu" in an interpreter: True, or Pallas' own parameters.

    Returns:
      The buffers.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve the arguments.

    Example:
      keys, values = append((keys, values), (key, value), lengths)
    """
    for buffer, x in zip(buffers, new, strict=True):
        rows, heads, _, width = buffer.shape
        if x.shape != (rows, heads, width) or slots.shape != (rows,):
            raise ValueError(f"new {x.shape} and slots {slots.shape} do not fit a buffer {buffer.shape}")
    implementations = bound(IMPLEMENTATIONS, interpret)

    @jax.custom_jvp
    def run(buffers: Buffers, new: Buffers, slots: jax.Array) -> Buffers:
        return dispatch("append", implementation, implementations, _ORDER, buffers, new, slots)

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Buffers, Buffers]:
        """It is linear in the buffers and what is new."""
        return run(*primals), xla.append(tangents[0], tangents[1], primals[2])

    return run(tuple(buffers), tuple(x.astype(b.dtype) for x, b in zip(new, buffers)), slots.astype(jnp.int32))
