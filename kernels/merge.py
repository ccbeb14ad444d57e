"""Merging partial attentions by their log-sum-exp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from the attention over each.

    out = sum_i exp(lse_i - lse) out_i  with  lse = log sum_i exp(lse_i).  A part without keys has lse = -inf and
    adds nothing; if no part has keys the result is 0 and -inf, like that of an empty segment.

    Args:
      parts: (out f32 [..., head_dim], lse f32 [...]) of each part.

    Returns:
      (out f32 [..., head_dim], lse f32 [...]).
    """
    lse = parts[0][1]
    for _, other in parts[1:]:
        lse = jnp.logaddexp(lse, other)
    finite = jnp.where(lse == -jnp.inf, 0.0, lse)  # -inf - -inf would be NaN
    out = sum(jnp.exp(part - finite)[..., None] * out for out, part in parts)
    return jnp.asarray(out), lse
