"""Linear layers, those of decoders, towers and projectors. Nothing else looks into their parameters, so how weights
lie is decided here alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Linear(nn.Module):
    """`x @ kernel + bias`, the kernel [channels, features].

    Other representations, 8-bit codes with their scales say, have their place here: parameters are declared and
    multiplied with in `__call__` alone. Parameters that hold "lora_a" [channels, rank] and "lora_b" [rank, features]
    beside the kernel add `(x @ lora_a) @ lora_b`: two narrow products, and none of the kernel's size.

    Attributes:
      features: of the output.
      use_bias: whether there is a bias.
      dtype: of the computation.
      wide: the product is accumulated and returned in float32, whatever `dtype` is.
      kernel_init: draws a new kernel.
    """

    features: int
    use_bias: bool
    dtype: Any
    wide: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., channels] -> [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(self.dtype)
        out = self._product(x, kernel)
        if self.has_variable("params", "lora_a"):
            low = self._product(x, self.get_variable("params", "lora_a")).astype(self.dtype)
            out = out + self._product(low, self.get_variable("params", "lora_b"))
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return out + jnp.expand_dims(bias.astype(out.dtype), range(out.ndim - 1))

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        wide = jnp.float32 if self.wide else None
        return jax.lax.dot_general(x, kernel.astype(self.dtype), contract, preferred_element_type=wide)


def dense(features: int, dtype: Any, name: str | None = None, use_bias: bool = True) -> Linear:
    """A linear layer of a tower or a projector, drawn as Flax draws its own."""
    return Linear(features, use_bias, dtype, kernel_init=nn.initializers.lecun_normal(), name=name)


def project(x: jax.Array, outputs: dict[str, int], use_bias: bool, dtype: Any, fused: bool) -> list[jax.Array]:
    """Several projections of one input, to be called where a module is made (`nn.compact`).

    Args:
      x: [..., channels].
      outputs: names and features.
      use_bias: whether all of them have a bias.
      dtype: of the computation.
      fused: one product with one matrix, called by all names joined with "_".

    Returns:
      [..., features] of each.
    """
    if not fused:
        return [Linear(features, use_bias, dtype, name=name)(x) for name, features in outputs.items()]
    whole = Linear(sum(outputs.values()), use_bias, dtype, name="_".join(outputs))(x)
    return jnp.split(whole, np.cumsum(list(outputs.values()))[:-1].tolist(), axis=-1)
