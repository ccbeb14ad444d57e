"""`RollingWindow`: the latest generated tokens are kept, in a ring."""

import dataclasses

import jax.numpy as jnp

from vlcache_jax.cache.state import KVState
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.decoding.append import appending
from vlcache_jax.policies.decoding.rule import DecodingRule, Step, check_count, check_ring, named
from vlcache_jax.typing import ModelSpec


@named("window", count="TOKENS")
@dataclasses.dataclass(frozen=True)
class RollingWindow(DecodingRule):
    """The latest `tokens` of them, in a ring; what was kept of the prompt stays.

    A step costs what it costs with `Append`. After StreamingLLM (arXiv 2309.17453), whose sinks are the context's
    matter: a step's own token and the `tokens - 1` before it are seen, at the positions they have.

    Raises:
      PolicyError: tokens below 1.
    """

    tokens: int = 256

    def __post_init__(self) -> None:
        check_count("RollingWindow", "tokens", self.tokens)

    def check_windows(self, largest: int) -> None:
        check_ring("RollingWindow", "tokens", self.tokens, largest)

    def tail_tokens(self, max_new_tokens: int) -> int:
        return self.tokens

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        length = state.tail.length
        slot, count = length % self.tokens, jnp.minimum(length + 1, self.tokens)
        return appending(state, kernels, spec, slot, count, ring=(self.tokens, length + 1))
