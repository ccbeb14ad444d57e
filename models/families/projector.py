"""The two-layer MLP between vision features and decoder embeddings, of LLaVA and InternVL."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.models.activations import activation
from vlcache_jax.models.linear import Linear, dense
from vlcache_jax.models.vision.encoder import layer_norm


class Projector(nn.Module):
    """`linear_2(activation(linear_1(x)))` (LLaVA-1.5, https://arxiv.org/abs/2310.03744).

    Parameters: linear_1/kernel [vision channels, D], linear_2/kernel [D, D], with biases [D] if `use_bias`; with `norm`
    also norm/{scale, bias} [vision channels].

    Attributes:
      hidden_size: D, the decoder's hidden size.
      activation: Its name, see `vlcache_jax.models.activations`.
      use_bias: Whether both linear layers have a bias.
      norm: Whether features are normalised first (InternVL).
      dtype: Of the computation and of the result.
    """

    hidden_size: int
    activation: str = "gelu"
    use_bias: bool = True
    norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[..., vision channels] -> [..., D]."""

        def linear(name: str) -> Linear:
            return dense(self.hidden_size, self.dtype, name, self.use_bias)

        if self.norm:
            features = layer_norm(features, 1e-5, self.dtype, "norm")
        return linear("linear_2")(activation(self.activation)(linear("linear_1")(features)))
