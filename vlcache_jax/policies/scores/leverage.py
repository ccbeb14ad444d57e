"""Statistical leverage of keys: how far a key lies outside of what the others span."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.kernels.varying import varying
from vlcache_jax.policies.scores.attention import LayerInputs, Score


@dataclasses.dataclass(frozen=True)
class Leverage(Score):
    """Approximate leverage of each key before rotation, per KV head (Compactor, arXiv 2507.08143).

        X = (k - mean k) G,   G [head_dim, sketch] normal with variance 1 / sketch, the same for all heads
        score_j = x_j (X^T X + r I)^-1 x_j^T,   r = 0.01 + 1e-5 max diag(X^T X)

    over the prompt without its first `sinks` and last `recent` tokens. Heads of no more than `sketch` channels are not
    sketched: X = k - mean k. The ridge keeps an elimination in float32 from failing.
    """

    sketch: int = 48
    sinks: int = 0
    recent: int = 0
    needs_attention = False

    def __post_init__(self) -> None:
        for name, least in (("sketch", 1), ("sinks", 0), ("recent", 0)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise PolicyError(f"{name}={value!r} is out of range: give a whole number, at least {least}")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        key, head_dim = inputs.unrotated(inputs.key), inputs.key.shape[3]
        inside = between(inputs, self.sinks, self.recent)[:, :, None, None]
        count = jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1).astype(jnp.float32)
        mean = jnp.sum(jnp.where(inside, key, 0), axis=1, keepdims=True) / count
        x = jnp.where(inside, key - mean, 0)
        if self.sketch < head_dim:
            x = jnp.einsum("bshd,dk->bshk", x, jnp.asarray(_normal(head_dim, self.sketch)), precision="highest")
        gram = jnp.einsum("bshk,bshl->bhkl", x, x, precision="highest")
        ridge = 0.01 + 1e-5 * jnp.max(jnp.diagonal(gram, axis1=2, axis2=3), axis=-1)
        return _solved(gram, ridge, x.transpose(0, 2, 3, 1))


def between(inputs: LayerInputs, sinks: int, recent: int) -> jax.Array:
    """bool [batch, length]: the prompt's tokens without its first `sinks` and last `recent` ones."""
    place = jax.lax.iota(jnp.int32, inputs.key.shape[1])[None]
    return (place >= sinks) & (place < (inputs.lengths - recent)[:, None])


def _solved(gram: jax.Array, ridge: jax.Array, x: jax.Array) -> jax.Array:
    """x' (gram + ridge I)^-1 x of every column: [..., k, k], [...], [..., k, n] -> [..., n].

    Elimination, a row at a time, of symmetric positive matrices that are small. Not LAPACK's: two programs with it,
    running at once on a CPU of two cores, were seen to wait for each other for ever (jaxlib 0.10.2).
    """
    size = gram.shape[-1]
    gram = gram + ridge[..., None, None] * jnp.eye(size, dtype=gram.dtype).reshape(*(1,) * ridge.ndim, size, size)

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, total = state  # [..., k, k + n]: what is left of the matrix, and beside it of x
        row = jax.lax.dynamic_index_in_dim(rows, number, axis=-2, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, number, axis=-1)
        row = row * jax.lax.rsqrt(jnp.maximum(pivot, ridge[..., None]))  # no less, but for rounding
        return rows - row[..., :size, None] * row[..., None, :], total + row[..., size:] ** 2

    start = jnp.concatenate([gram, x], axis=-1), varying(jnp.zeros_like(x[..., 0, :]), x)
    return jax.lax.fori_loop(0, size, step, start)[1]


def _normal(rows: int, columns: int) -> np.ndarray:
    """The sketch, which must be the same everywhere and for ever: of a generator whose numbers are promised."""
    drawn = np.random.RandomState(0).standard_normal((rows, columns))
    return (drawn / np.sqrt(columns)).astype(np.float32)
