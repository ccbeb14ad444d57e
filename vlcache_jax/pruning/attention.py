"""Attention of a few tokens of a stage, by which most methods choose."""

import jax
import jax.numpy as jnp

from vlcache_jax.pruning.method import Project
from vlcache_jax.pruning.stage import Stage


def of_last_token(
    project: Project, stage: Stage, layer: int, *, over: jax.Array | None = None, rotated: bool = True
) -> jax.Array:
    """The attention of each row's last token, f32 [batch, room], averaged over query heads.

        mean over heads of softmax over j of q_(n-1) . k_j / sqrt(d)

    Args:
      project: see `Between`.
      stage: tokens as they enter the layer.
      layer: whose queries and keys these are.
      over: bool [batch, room], the tokens that the softmax is over; all by default.
      rotated: with rotary positions, or as if all tokens were at position 0.
    """
    last, positions = stage.tokens(stage.lengths[:, None] - 1)
    places = (positions, stage.positions) if rotated else (jnp.zeros_like(positions), jnp.zeros_like(stage.positions))
    query, _, _ = project(layer, last, places[0])
    _, key, _ = project(layer, stage.hidden, places[1])
    batch, head_dim = query.shape[0], query.shape[-1]
    query = query.reshape(batch, key.shape[2], -1, head_dim)
    logits = jnp.einsum("bhgd,bshd->bhgs", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    over = stage.valid if over is None else over
    attention = jax.nn.softmax(jnp.where(over[:, None, None], logits, -jnp.inf), axis=-1)
    return jnp.mean(attention, axis=(1, 2))
