"""The projections of a decoder. Nothing else looks into their parameters, so how weights lie is decided here alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Linear(nn.Module):
    """`x @ kernel + bias`, the kernel [channels, features].

    Other representations, 8-bit codes with their scales say, have their place here: parameters are declared and
    multiplied with in `__call__` alone.

    Attributes:
      features: of the output.
      use_bias: whether there is a bias.
      dtype: of the computation.
      wide: the product is accumulated and returned in float32, whatever `dtype` is.
    """

    features: int
    use_bias: bool
    dtype: Any
    wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., channels] -> [..., features]."""
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        out = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            contract,
            preferred_element_type=jnp.float32 if self.wide else None,
        )
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return out + jnp.expand_dims(bias.astype(out.dtype), range(out.ndim - 1))


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
