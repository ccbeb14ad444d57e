"""Expected attention (NVIDIA/kvpress: what coming queries will attend to, without seeing them)."""

import dataclasses
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import local, split_axes
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score

_CHUNK = 16  # future positions whose rotations exist at once


@dataclasses.dataclass(frozen=True)
class ExpectedScore(Score):
    """The attention that a normally distributed query expects to give, times the size of the value.

    For each query head, with q the prompt's queries before rotation, without the first `sinks`:

        mu, S     = mean and covariance of q
        R         = mean of the rotations at the next `future` positions n .. n + future - 1
        z_j       = (R mu) . k_j / sqrt(d) + k_j (R S R^T) k_j / (2 d)
        score_j   = softmax over j of z_j, averaged over the query heads of a KV head, times |v_j|

    which is the expectation of exp(q . k_j / sqrt(d)), normalised. The first `sinks` keys take no part in the softmax
    and score 0, as in kvpress: heads that lean on a sink would otherwise have no say in the mean.
    """

    sinks: int = 4
    future: int = 512
    needs_attention = False

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("future", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise PolicyError(f"{name}={value!r} is out of range: give a whole number, at least {least}")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        rows, length, _, head_dim = inputs.query.shape
        ahead = self._future_rotation(inputs, head_dim)  # [batch, d, d]: row i is the rotated i-th unit vector
        query = inputs.unrotated(inputs.query)

        def one_row(item: tuple[jax.Array, ...]) -> jax.Array:
            query, key, value, n, ahead = item
            key, value = (x.astype(jnp.float32).swapaxes(0, 1) for x in (key, value))  # [kv_heads, length, d]
            skip = jnp.minimum(self.sinks, n - 1)
            count = (n - skip).astype(jnp.float32)
            used = ((jax.lax.iota(jnp.int32, length) >= skip) & (jax.lax.iota(jnp.int32, length) < n))[:, None, None]
            mean = jnp.sum(jnp.where(used, query, 0), axis=0) / count  # [heads, d]
            away = jnp.where(used, query - mean[None], 0)
            covariance = jnp.einsum("thd,the->hde", away, away, precision="highest") / count
            mean = jnp.einsum("hd,de->he", mean, ahead, precision="highest")
            covariance = jnp.einsum("hij,id,je->hde", covariance, ahead, ahead, precision="highest")
            mean = mean.reshape(len(key), -1, head_dim)
            covariance = covariance.reshape(len(key), -1, head_dim, head_dim)
            z = jnp.einsum("kgd,ksd->kgs", mean, key, precision="highest") * head_dim**-0.5
            spread = jnp.einsum("kgde,ksd->kgse", covariance, key, precision="highest")
            z = z + jnp.einsum("kgse,kse->kgs", spread, key, precision="highest") / (2 * head_dim)
            scored = used[:, 0, 0]
            attention = jax.nn.softmax(jnp.where(scored, z, -jnp.inf), axis=-1)
            attention = jnp.where(scored, attention, 0 * z)  # so that a sink that is not finite is noticed
            return jnp.mean(attention, axis=1) * jnp.linalg.norm(value, axis=-1)

        over, heads = split_axes(rows, inputs.key.shape[2])
        split, row = PartitionSpec(over, None, heads), PartitionSpec(over)
        own = local(partial(jax.lax.map, one_row), ((split, split, split, row, row),), PartitionSpec(over, heads))
        return own((query, inputs.key, inputs.value, inputs.lengths, ahead))

    def _future_rotation(self, inputs: LayerInputs, head_dim: int) -> jax.Array:
        """The mean rotation of the next positions, f32 [batch, d, d], applied to row vectors from the right."""
        rows = inputs.lengths.shape[0]
        unit = jnp.broadcast_to(jnp.eye(head_dim, dtype=jnp.float32), (rows, _CHUNK, head_dim, head_dim))

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            assert inputs.rotate is not None
            step = i * _CHUNK + jax.lax.iota(jnp.int32, _CHUNK)
            turned = inputs.rotate(unit, inputs.next_positions[:, None] + step[None])
            return total + jnp.sum(jnp.where((step < self.future)[None, :, None, None], turned, 0), axis=1)

        zero = jnp.zeros((rows, head_dim, head_dim), jnp.float32)
        return jax.lax.fori_loop(0, -(-self.future // _CHUNK), add, varying(zero, inputs.lengths)) / self.future


@method("expected_attention", title="Expected attention", query_agnostic=True)
def ExpectedAttention(
    budget: Budget = DEFAULT_BUDGET,
    *,
    sinks: int = 4,
    future: int = 512,
    recent: float = 0.0,
    **options: Unpack[Options],
) -> Policy:
    """Keeps what the average coming query is expected to attend to; see `ExpectedScore`.

    Choices. kvpress takes the queries of the prompt for the distribution of coming ones, as here; the first tokens are
    left out of it and always kept. Padding takes no part.

    Query-agnostic in kind: it needs no question window, but a question in the prompt is part of the average.

    Args:
      budget: see `Policy.budget`.
      sinks: first tokens, always kept and left out of the statistics.
      future: positions over which the rotation is averaged.
      recent: fraction of a layer's slots for its most recent tokens; the last token is kept in any case.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> ExpectedAttention().sinks
      4
    """
    return Policy(
        name="expected_attention",
        budget=budget,
        score=ExpectedScore(sinks, future),
        recent=recent,
        sinks=sinks,
        **options,
    )
