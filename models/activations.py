"""Activation functions by the names `config.json` uses."""

import difflib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlcache_jax.errors import VLCacheError


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`: the sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """`x * Phi(x)`, with the distribution function of the normal distribution.

    Its derivative is written out: that of JAX's error function cannot be taken inside a checked `jax.shard_map` (0.12).
    """
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    below = 0.5 * jax.lax.erfc(-(0.5**0.5) * wide)
    density = jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return gelu(x), (below + wide * density).astype(x.dtype) * tangent


_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function called `name` (`hidden_act` and the like in a `config.json`).

    Raises:
      VLCacheError: if there is none of that name; the message lists the supported ones, the nearest first.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=len(ACTIVATIONS), cutoff=0.0)
        raise VLCacheError(f"activation {name!r} is not supported; use one of: {', '.join(near)}") from None
