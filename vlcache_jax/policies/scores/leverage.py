"""Statistical leverage of keys: how far a key lies outside of what the others span."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlcache_jax.errors import PolicyError
from vlcache_jax.parallel.mesh import local, split_axes
from vlcache_jax.policies.scores.attention import LayerInputs, Score


@dataclasses.dataclass(frozen=True)
class Leverage(Score):
    """Approximate leverage of each key before rotation, per KV head (Compactor, arXiv 2507.08143).

        X = (k - mean k) G,   G [head_dim, sketch] normal with variance 1 / sketch, the same for all heads
        score_j = x_j (X^T X + r I)^-1 x_j^T,   r = 0.01 + 1e-5 max diag(X^T X)

    over the prompt without its first `sinks` and last `recent` tokens. Heads of no more than `sketch` channels are not
    sketched: X = k - mean k. The ridge keeps a Cholesky factorisation in float32 from failing.
    """

    sketch: int = 48
    sinks: int = 0
    recent: int = 0
    needs_attention = False

    def __post_init__(self) -> None:
        for name, least in (("sketch", 1), ("sinks", 0), ("recent", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PolicyError(f"{name}={value!r} is out of range: give a whole number, at least {least}")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        rows, _, kv_heads, head_dim = inputs.key.shape
        inside = between(inputs, self.sinks, self.recent)

        def leverage(key: jax.Array, inside: jax.Array) -> jax.Array:
            """key f32 [batch, length, kv_heads, head_dim], inside bool [batch, length] -> [batch, kv_heads, length]."""
            inside = inside[:, :, None, None]
            count = jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1).astype(jnp.float32)
            mean = jnp.sum(jnp.where(inside, key, 0), axis=1, keepdims=True) / count
            x = jnp.where(inside, key - mean, 0)
            if self.sketch < head_dim:
                x = jnp.einsum("bshd,dk->bshk", x, jnp.asarray(_normal(head_dim, self.sketch)), precision="highest")
            gram = jnp.einsum("bshk,bshl->bhkl", x, x, precision="highest")
            ridge = 0.01 + 1e-5 * jnp.max(jnp.diagonal(gram, axis1=2, axis2=3), axis=-1)
            unit = jnp.eye(gram.shape[-1], dtype=jnp.float32)[None, None]
            factor = jnp.linalg.cholesky(gram + ridge[..., None, None] * unit)
            solved = jax.lax.linalg.triangular_solve(factor, x.transpose(0, 2, 3, 1), left_side=True, lower=True)
            return jnp.sum(solved**2, axis=2)

        over, heads = split_axes(rows, kv_heads)
        places = PartitionSpec(over, None, heads), PartitionSpec(over)
        return local(leverage, places, PartitionSpec(over, heads))(inputs.unrotated(inputs.key), inside)


def between(inputs: LayerInputs, sinks: int, recent: int) -> jax.Array:
    """bool [batch, length]: the prompt's tokens without its first `sinks` and last `recent` ones."""
    place = jax.lax.iota(jnp.int32, inputs.key.shape[1])[None]
    return (place >= sinks) & (place < (inputs.lengths - recent)[:, None])


def _normal(rows: int, columns: int) -> np.ndarray:
    """The sketch, which must be the same everywhere and for ever: of a generator whose numbers are promised."""
    drawn = np.random.RandomState(0).standard_normal((rows, columns))
    return (drawn / np.sqrt(columns)).astype(np.float32)
