"""Compactor (Chari and Van Durme, arXiv 2507.08143), as in NVIDIA/kvpress."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.kernels.varying import varying
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget, Tokens
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.policies.scores.leverage import Leverage, between


@dataclasses.dataclass(frozen=True)
class LeverageAndAttention(Score):
    """Leverage of the keys, and what tokens near each other look at whatever their order.

    Over the tokens j behind the first `sinks` and before the last `recent` ones, cut into chunks of `chunk`:

        a_j     = sum over the tokens q of j's chunk of softmax over i in the chunk of q_q . k_i, at i = j,
                  averaged over the query heads of a KV head, times |v_j|; then the mean over 3 neighbours
        score_j = blend * z(leverage)_j + z(a)_j

    with `Leverage` for each KV head, and z(x) = (x - mean) / deviation over all KV heads and tokens of a layer. The
    logits are not divided by the root of the head size, and nothing is masked within a chunk. `blend` None is the part
    of the cache that an average layer gives up. What is left out scores as the best token does.
    """

    blend: float | None = None
    sketch: int = 48
    chunk: int = 256
    sinks: int = 8
    recent: int = 4
    needs_attention = False

    def __post_init__(self) -> None:
        if self.blend is not None and (isinstance(self.blend, bool) or not 0 <= self.blend < float("inf")):
            raise PolicyError(f"blend={self.blend!r} is out of range: give a weight of 0 or more, or None")
        if not is_whole(self.chunk, 1):
            raise PolicyError(f"chunk={self.chunk!r} is out of range: give a whole number, at least 1")
        self.leverage  # noqa: B018  (checks its options)

    @property
    def leverage(self) -> Leverage:
        """The other half."""
        return Leverage(self.sketch, self.sinks, self.recent)

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        inside = between(inputs, self.sinks, self.recent)[:, None]
        attention = self._attention(inputs, inside[:, 0])
        near = jnp.pad(jnp.where(inside, attention, 0), ((0, 0), (0, 0), (1, 1)))
        attention = (near[..., :-2] + near[..., 1:-1] + near[..., 2:]) / 3
        blend: float | jax.Array
        if self.blend is None:
            assert inputs.slots is not None
            blend = 1 - inputs.slots.astype(jnp.float32) / inputs.prompt_lengths.astype(jnp.float32)
            blend = blend[:, None, None]
        else:
            blend = self.blend
        mixed = blend * _standard(self.leverage(inputs), inside) + _standard(attention, inside)
        best = jnp.max(jnp.where(inside, mixed, -jnp.inf), axis=(1, 2), keepdims=True)
        best = jnp.where(jnp.any(inside, axis=2, keepdims=True), best, 0)
        broken = 0 * jnp.sum(inputs.key.astype(jnp.float32), axis=3).swapaxes(1, 2)  # what is not finite shows
        return jnp.where(inside, mixed, best + broken)

    def _attention(self, inputs: LayerInputs, inside: jax.Array) -> jax.Array:
        """f32 [batch, kv_heads, length]: the column sums within chunks, times the norm of the values."""
        batch, length, heads, head_dim = inputs.query.shape
        kv_heads = inputs.key.shape[2]
        chunk = min(self.chunk, max(length - self.sinks, 1))
        chunks = -(-max(length - self.sinks, 1) // chunk)

        def padded(x: jax.Array) -> jax.Array:
            more = self.sinks + chunks * chunk - length
            return jnp.pad(x, ((0, 0), (0, max(more, 0)), *((0, 0),) * (x.ndim - 2)))

        query, key, used = padded(inputs.query), padded(inputs.key), padded(inside)

        def step(number: jax.Array, total: jax.Array) -> jax.Array:
            start = self.sinks + number * chunk
            q, k, here = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (query, key, used))
            q = q.astype(jnp.float32).reshape(batch, chunk, kv_heads, heads // kv_heads, head_dim)
            logits = jnp.einsum("bthgd,bshd->bhgts", q, k.astype(jnp.float32), precision="highest")
            columns, rows = here[:, None, None, None], here[:, None, None, :, None]
            weights = jax.nn.softmax(jnp.where(rows & columns, logits, jnp.where(rows, -jnp.inf, 0)), axis=-1)
            sums = jnp.mean(jnp.sum(jnp.where(rows, weights, 0), axis=3), axis=2)
            return jax.lax.dynamic_update_slice_in_dim(total, sums, start, axis=2)

        total = varying(jnp.zeros((batch, kv_heads, key.shape[1]), jnp.float32), inputs.key, inside)
        received = jax.lax.fori_loop(0, chunks, step, total)[..., :length]
        return received * jnp.linalg.norm(inputs.value.astype(jnp.float32), axis=-1).swapaxes(1, 2)


def _standard(x: jax.Array, inside: jax.Array) -> jax.Array:
    """(x - mean) / deviation over the tokens inside, all heads together; x [batch, heads, length]."""
    count = (x.shape[1] * jnp.sum(inside, axis=(1, 2), keepdims=True)).astype(jnp.float32)
    mean = jnp.sum(jnp.where(inside, x, 0), axis=(1, 2), keepdims=True) / jnp.maximum(count, 1)
    away = jnp.where(inside, x - mean, 0)
    deviation = jnp.sqrt(jnp.sum(away**2, axis=(1, 2), keepdims=True) / jnp.maximum(count - 1, 1))
    return away / jnp.maximum(deviation, 1e-6)


@method("compactor", title="Compactor", query_agnostic=True)
def Compactor(
    budget: Budget = DEFAULT_BUDGET,
    *,
    blend: float | None = None,
    sketch: int = 48,
    chunk: int = 256,
    sinks: int = 8,
    recent: int = 4,
    **options: Unpack[Options],
) -> Policy:
    """Keys that lie apart from the others, and tokens that their neighbourhood looks at; see `LeverageAndAttention`.

    Choices. As in kvpress, whose default for `blend` is the part that is evicted. It draws another sketch for every
    head and run; here it is fixed. Padding takes no part in the last chunk (in kvpress 0.5.5 it does).

    Query-agnostic.

    Args:
      budget: see `Policy.budget`.
      blend: weight of the leverage; None for one minus the kept part.
      sketch: channels that keys are projected to for the leverage.
      chunk: tokens that look at each other.
      sinks: first tokens, always kept.
      recent: last tokens, always kept.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range, or sinks and recent tokens that do not fit into a budget in tokens.

    Example:
      >>> Compactor().score.leverage
      Leverage(sketch=48, sinks=8, recent=4)
    """
    return Policy(
        name="compactor",
        budget=budget,
        score=LeverageAndAttention(blend, sketch, chunk, sinks, recent),
        recent=Tokens(recent),
        sinks=sinks,
        **options,
    )
