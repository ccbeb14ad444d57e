"""Merging partial attentions by their log-sum-exp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from the attention over each.

    out = sum_i exp(lse_i - lse) out_i  with  lse = log sum_i exp(lse_i).  A part without keys has lse = -inf and
    adds nothing; at least one part of every row must have keys.

    Args:
      parts: (out f32 [..., head_dim], lse f32 [...]) of each part.

    Returns:
      (out f32 [..., head_dim], lse f32 [...]).
    """
    lse = parts[0][1]
    for _, other in parts[1:]:
        lse = jnp.logaddexp(lse, other)
    out = sum(jnp.exp(part - lse)[..., None] * out for out, part in parts)
    return jnp.asarray(out), lse
