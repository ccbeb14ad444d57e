"""Key difference (KeyDiff; as NVIDIA/kvpress computes it)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from vlcache_jax.policies.budget import DEFAULT_BUDGET, Budget
from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Options, Policy
from vlcache_jax.policies.scores.attention import LayerInputs, Score


def unit_keys(inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
    """Keys of length 1, 0 where there is padding, and their mean over the prompt.

    Returns:
      (f32 [batch, kv_heads, length, head_dim], f32 [batch, kv_heads, head_dim]).
    """
    key = inputs.key.astype(jnp.float32).swapaxes(1, 2)
    key = key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-12)
    key = jnp.where(inputs.valid[:, None, :, None], key, 0)
    return key, jnp.sum(key, axis=2) / inputs.lengths.astype(jnp.float32)[:, None, None]


def anchor_cosine(inputs: LayerInputs) -> jax.Array:
    """Cosine of each key with the mean of the prompt's keys of length 1; f32 [batch, kv_heads, length]."""
    key, mean = unit_keys(inputs)
    mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return jnp.einsum("bhld,bhd->bhl", key, mean, precision="highest")


@dataclasses.dataclass(frozen=True)
class KeyDifferenceScore(Score):
    """Minus the cosine of a key with the mean direction of all keys."""

    needs_attention = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        return -anchor_cosine(inputs)


@method("key_difference", title="Key difference", query_agnostic=True)
def KeyDifference(budget: Budget = DEFAULT_BUDGET, *, recent: float = 0.1, **options: Unpack[Options]) -> Policy:
    """The tokens whose keys differ most from the mean direction: near-duplicates go first.

        score_j = -cos(k_j, mean over i of k_i / |k_i|), for every KV head, on rotated keys

    Choices: kvpress's formula, which keeps no recent window; here one is kept like in the other methods, and
    `recent=0.0` keeps only the last token besides.

    Query-agnostic: no attention is needed.

    Args:
      budget: see `Policy.budget`.
      recent: fraction of a layer's slots for its most recent tokens.
      **options: see `Options`.

    Raises:
      PolicyError: an option out of range.

    Example:
      >>> KeyDifference().name
      'key_difference'
    """
    return Policy(name="key_difference", budget=budget, score=KeyDifferenceScore(), recent=recent, **options)
