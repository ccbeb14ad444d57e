"""Linear layers, those of decoders, towers and projectors. Nothing else looks into their parameters, so how weights
lie is decided here alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.parallel import ops

STACKS = "stacks"
"""A collection of variables: a coded projection's parameters, but of all layers, each with the layer's number."""


class Linear(nn.Module):
    """`x @ kernel + bias`, the kernel [channels, features], or codes and scales in its place (`WeightCoding.shapes`).

    Parameters that hold "lora_a" [channels, rank] and "lora_b" [rank, features] beside the kernel or the codes add
    `(x @ lora_a) @ lora_b`: two narrow products, and none of the kernel's size. Beside "lora_key", a random key, each
    number of that x stays with the probability "lora_keep" and is 0 otherwise.

    Attributes:
      features: of the output.
      use_bias: whether there is a bias.
      dtype: of the computation.
      wide: the product is accumulated and returned in float32, whatever `dtype` is; of a float kernel.
      kernel_init: draws a new kernel.
      coding: of the weight; None is a float kernel.
    """

    features: int
    use_bias: bool
    dtype: Any
    wide: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)
    coding: WeightCoding | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., channels] -> [..., features]."""
        x = x.astype(self.dtype)
        if self.coding is None:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
            out = self._product(x, kernel)
        else:
            out = self._coded_product(x, self.coding)
        if self.has_variable("params", "lora_a"):
            if self.has_variable("params", "lora_key"):
                keep: Any = self.get_variable("params", "lora_keep")
                x = jnp.where(jax.random.bernoulli(self.get_variable("params", "lora_key"), keep, x.shape), x, 0)
            low = self._product(x, self.get_variable("params", "lora_a")).astype(self.dtype)
            out = out + self._product(low, self.get_variable("params", "lora_b"))
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return out + jnp.expand_dims(bias.astype(out.dtype), range(out.ndim - 1))

    def matrix(self, channels: int) -> jax.Array:
        """What inputs of so many channels are multiplied with: [channels, features], whatever it is made of."""
        if self.coding is None and not self.has_variable("params", "lora_a"):
            return self.get_variable("params", "kernel").astype(self.dtype)
        zero = jnp.zeros((1, channels), self.dtype)
        return self(jnp.eye(channels, dtype=self.dtype)) - self(zero)

    @nn.nowrap  # which would name it in every program
    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        wide = jnp.float32 if self.wide else None
        return jax.lax.dot_general(x, kernel.astype(self.dtype), contract, preferred_element_type=wide)

    def _coded_product(self, x: jax.Array, coding: WeightCoding) -> jax.Array:
        found: dict[str, jax.Array] = {}
        layer: Any = 0
        for name, (shape, dtype) in coding.shapes(x.shape[-1], self.features).items():
            if self.has_variable(STACKS, name):
                found[name], layer = self.get_variable(STACKS, name)
            else:
                found[name] = self.param(name, _random, shape, dtype)[None]
        return ops.quantised_matmul(str(self.name), x, **found, layer=layer)


def _random(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Of a model without a checkpoint."""
    if dtype == "float32":
        return jnp.full(shape, 0.003, jnp.float32)
    return jax.random.randint(key, shape, -8, 8, jnp.int8).astype(dtype)


def dense(features: int, dtype: Any, name: str | None = None, use_bias: bool = True) -> Linear:
    """A linear layer of a tower or a projector, drawn as Flax draws its own."""
    return Linear(features, use_bias, dtype, kernel_init=nn.initializers.lecun_normal(), name=name)


def project(
    x: jax.Array, outputs: dict[str, int], use_bias: bool, dtype: Any, fused: bool, coding: WeightCoding | None = None
) -> list[jax.Array]:
    """Several projections of one input, to be called where a module is made (`nn.compact`).

    Args:
      x: [..., channels].
      outputs: names and features.
      use_bias: whether all of them have a bias.
      dtype: of the computation.
      fused: one product with one matrix, called by all names joined with "_".
      coding: of their weights.

    Returns:
      [..., features] of each.
    """
    if not fused:
        return [Linear(features, use_bias, dtype, coding=coding, name=name)(x) for name, features in outputs.items()]
    whole = Linear(sum(outputs.values()), use_bias, dtype, coding=coding, name="_".join(outputs))(x)
    return jnp.split(whole, np.cumsum(list(outputs.values()))[:-1].tolist(), axis=-1)
