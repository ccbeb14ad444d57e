"""LagKV (Liang et al., arXiv 2504.04704): how a token differs from the span of those that come a lag later."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score


@dataclasses.dataclass(frozen=True)
class LagRelative(Score):
    """Spread of a token's key and value, as the next block of tokens measures it.

    Behind the first `sinks` tokens the prompt falls into blocks of `lag` tokens; the last full one, and what follows
    it, is the tail. For each KV head, x the keys or the values of a block and r those of the next block:

        u_j   = (x_j - min r) / (max r - min r), per channel, with the extremes over the tokens of r
        s_j   = softmax over the tokens of the block of the standard deviation of u_j over channels (d - 1)
        score = the token's rank by s(keys) + s(values) within its block, from 0 up, divided by `lag`

    so that every block gives up equally many. The tail comes first, its latest tokens before the others; sinks score 0,
    since the policy keeps them. A channel in which all of r are equal counts as 0.
    """

    sinks: int = 4
    lag: int = 128
    needs_attention = False

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("lag", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise PolicyError(f"{name}={value!r} is out of range: give a whole number, at least {least}")

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        batch, length, kv_heads, _ = inputs.key.shape
        blocks = -(-max(length - self.sinks, 1) // self.lag)
        scored = jnp.maximum((inputs.lengths - self.sinks) // self.lag - 1, 0)  # blocks with a full one behind them
        wide = self.sinks + blocks * self.lag

        def in_blocks(x: jax.Array) -> jax.Array:
            """[batch, kv_heads, blocks, lag, head_dim]."""
            x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, max(wide - length, 0)), (0, 0), (0, 0)))
            return x[:, self.sinks : wide].reshape(batch, blocks, self.lag, kv_heads, -1).transpose(0, 3, 1, 2, 4)

        def spread(x: jax.Array) -> jax.Array:
            behind = jnp.roll(x, -1, axis=2)
            low, high = jnp.min(behind, axis=3, keepdims=True), jnp.max(behind, axis=3, keepdims=True)
            unit = jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1), 0 * (x + low))
            return jax.nn.softmax(jnp.std(unit, axis=-1, ddof=1), axis=-1)

        spreads = spread(in_blocks(inputs.key)) + spread(in_blocks(inputs.value))
        better = jnp.argsort(jnp.argsort(-spreads, axis=-1, stable=True), axis=-1, stable=True)  # tokens before it
        rank = (self.lag - 1 - better).astype(jnp.float32) / self.lag + 0 * spreads  # what is not finite shows
        rank = rank.reshape(batch, kv_heads, -1)
        rank = jnp.pad(rank, ((0, 0), (0, 0), (self.sinks, 0)))[..., :length]
        place = jax.lax.iota(jnp.int32, length)[None]
        behind = place - (self.sinks + scored * self.lag)[:, None]  # in the tail, below 2 * lag
        tail = 1 + behind.astype(jnp.float32) / (2 * self.lag)
        return jnp.where((behind >= 0)[:, None], tail[:, None], jnp.where((place < self.sinks)[:, None], 0, rank))


@method("lag_kv", title="LagKV", query_agnostic=True)
def LagKV(budget: Budget = DEFAULT_BUDGET, *, sinks: int = 4, lag: int = 128, **options: Unpack[Options]) -> Policy:
    """The tokens that stand out against the block that follows theirs; no attention, no queries. See `LagRelative`.

    Choices. As in kvpress, on rotated keys, and with the tail (the last full block and what follows it) ranked before
    everything else. The paper keeps the whole tail; here the budget is a promise, so where the tail exceeds it the
    latest tokens stay. A prompt of fewer than `sinks + 2 lag` tokens is all tail, hence `StreamingLLM`'s: give a `lag`
    that is small beside the prompt.

    Query-agnostic.

    Args:
      budget: see `Policy.budget`.
      sinks: first tokens, always kept.
      lag: tokens of a block.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> LagKV(lag=32).score
      LagRelative(sinks=4, lag=32)
    """
    return Policy(name="lag_kv", budget=budget, score=LagRelative(sinks, lag), recent=0.0, sinks=sinks, **options)
