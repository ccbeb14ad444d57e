"""The public function of the op."""

from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch
from vlcache_jax.kernels.quantised_matmul import pallas_tpu, reference, xla

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu.quantised_matmul,
    "xla": xla.quantised_matmul,
    "xla_blocks": xla.in_blocks,
    "reference": reference.quantised_matmul,
}
_ORDER = {"tpu": ("pallas_tpu", "xla"), "cuda": ("xla",), "default": ("xla_blocks",)}
_LINEAR = {"default": ("xla_blocks",), "tpu": ("xla",), "cuda": ("xla",)}  # what can be transposed


def quantised_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    layer: jax.Array | int = 0,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x @ ((codes[layer] - zeros[layer]) * scales[layer])`, a scale and a zero for every group of input channels.

    All layers' codes are given, and one of them is read where it lies: a kernel's argument that is a slice of a stack
    would be a copy of it. Differentiable in x; the weights are constants.

    Args:
      x: [..., channels], of any float type.
      codes: i8 or i4 [layers, channels, features].
      scales: f32 [layers, groups, features]; a group is so many consecutive channels. One group: a scale per feature.
      zeros: like the scales, in steps of codes; whole numbers, 256 at most from any code. None: zero.
      layer: i32 [].
      implementation: "pallas_tpu" (several groups), "xla", "xla_blocks", "reference"; None takes the platform's best.
      interpret: runs "pallas_tpu" in an interpreter: True, or Pallas' own parameters.

    Returns:
      [..., features], of x's type; sums are float32.

    Raises:
      ValueError: shapes that do not fit together, codes that are no integers, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve the arguments.

    Example:
      y = quantised_matmul(x, codes[None], scales[None])
    """
    layers, channels, features = codes.shape
    if x.shape[-1] != channels or scales.shape[::2] != (layers, features) or channels % scales.shape[1]:
        raise ValueError(f"x {x.shape}, codes {codes.shape} and scales {scales.shape} do not fit together")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros {zeros.shape} are not like the scales, {scales.shape}")
    if codes.dtype not in (jnp.int8, jnp.int4):
        raise ValueError(f"codes are {codes.dtype}: i8 or i4 are read")
    implementations = bound(IMPLEMENTATIONS, interpret)

    @jax.custom_jvp
    def run(x: jax.Array, *weights: Any) -> jax.Array:
        return dispatch("quantised_matmul", implementation, implementations, _ORDER, x, *weights)

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        weights = primals[1:]
        return run(*primals), dispatch("quantised_matmul", None, implementations, _LINEAR, tangents[0], *weights)

    rows = x.reshape(-1, channels)
    return run(rows, codes, scales, zeros, jnp.asarray(layer, jnp.int32)).reshape(*x.shape[:-1], features)
