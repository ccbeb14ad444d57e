"""Choosing the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, top-k and top-p sampling, applied in that order.

    Attributes:
      temperature: divides the logits; above 0. (Greedy decoding is `sampling=None`.)
      top_k: keep only the k largest logits (ties with the k-th too).
      top_p: keep only the smallest set of tokens whose probabilities reach p, in (0, 1]; at least one, and ties with
        the last too.

    Example:
      >>> Sampling(temperature=0.7, top_p=0.9)
      Sampling(temperature=0.7, top_k=None, top_p=0.9)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} must be above 0; for greedy decoding use sampling=None")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must lie in (0, 1]")


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits f32 [batch, vocab] after temperature, top-k and top-p: -inf where a token may not be drawn."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of the strictly better tokens
        count = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        lowest = jnp.take_along_axis(descending, count - 1, axis=-1)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return logits


def next_token(logits: jax.Array, sampling: Sampling | None, seeds: jax.Array, step: jax.Array | int) -> jax.Array:
    """Greedy or sampled token of each row.

    Args:
      logits: f32 [batch, vocab].
      sampling: None for greedy (the lowest id on a tie).
      seeds: i32 [batch]. A row's draw depends on its own seed and step only, never on the batch.
      step: index of the token in the answer.

    Returns:
      i32 [batch].
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(seed: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    return jax.vmap(draw)(seeds, filtered_logits(logits, sampling)).astype(jnp.int32)
