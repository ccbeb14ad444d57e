"""LLaVA's projector: the two-layer MLP between vision features and decoder embeddings."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.activations import activation
from vlcache_jax.models.linear import Linear, dense


class Projector(nn.Module):
    """`linear_2(activation(linear_1(x)))` (LLaVA-1.5, https://arxiv.org/abs/2310.03744).

    Parameters: linear_1/kernel [vision channels, D], linear_2/kernel [D, D], with biases [D] if `use_bias`.

    Attributes:
      hidden_size: D, the decoder's hidden size.
      activation: Its name, see `vlcache_jax.models.activations`.
      use_bias: Whether both linear layers have a bias.
      dtype: Of the computation and of the result.
    """

    hidden_size: int
    activation: str = "gelu"
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[..., vision channels] -> [..., D]."""

        def linear(name: str) -> Linear:
            return dense(self.hidden_size, self.dtype, name, self.use_bias)

        return linear("linear_2")(activation(self.activation)(linear("linear_1")(features)))
