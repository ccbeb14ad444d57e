"""What the answer's own rows attend to, which no method can know, and policies that keep just that.

The full cache's answer is fed to the model after its prompt, in one pass; the rows of the answer are those of its
decode steps. Column sums of their attention are what a perfect score would be.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax.demo.study.recording import Recording
from vlcache_jax.policies import Policy
from vlcache_jax.policies.allocate.uniform import Uniform
from vlcache_jax.policies.budget import Budget
from vlcache_jax.policies.methods.prefix_kv import EqualMass
from vlcache_jax.policies.scores.attention import LayerInputs, Score
from vlcache_jax.typing import Params, VisionLanguageModel


@partial(jax.jit, static_argnames=("model",))
def answer_attention(
    model: VisionLanguageModel,
    params: Params,
    recording: Recording,
    lengths: jax.Array,
    tokens: jax.Array,
    token_lengths: jax.Array,
) -> jax.Array:
    """Attention of an answer's rows to each prompt token, with the full cache.

    Args:
      model: the model.
      params: its own parameters.
      recording: of the prompts.
      lengths: i32 [batch], of the prompts.
      tokens: i32 [batch, n], the answers. Their last tokens are never fed to the model and have no rows.
      token_lengths: i32 [batch].

    Returns:
      f32 [layers, batch, kv_heads, length]: probabilities summed over the answer's rows and averaged over the query
      heads of a KV head; 0 for padding, and everywhere for answers of one token.
    """
    batch, length = recording.key.shape[1:3]
    row = jax.lax.iota(jnp.int32, tokens.shape[1])
    positions = lengths[:, None] + row[None]
    used = (row[None] < token_lengths[:, None] - 1)[:, :, None, None, None]  # [batch, rows, 1, 1, 1]
    prompt = jnp.broadcast_to(
        (jax.lax.iota(jnp.int32, length)[None] < lengths[:, None])[:, None], (batch, len(row), length)
    )
    own = jnp.broadcast_to(row[:, None] >= row[None], (batch, len(row), len(row)))
    seen = jnp.concatenate([prompt, own], axis=-1)[:, :, None, None]  # [batch, rows, 1, 1, length + rows]

    def attend(query, key, value, carry, recorded):
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(recorded, (key, value)))
        kv_heads, head_dim = key.shape[2:]
        q = query.reshape(batch, len(row), kv_heads, -1, head_dim)
        logits = jnp.einsum("bthgd,bshd->bthgs", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        out = jnp.einsum("bthgs,bshd->bthgd", weights.astype(values.dtype), values)
        sums = jnp.sum(jnp.mean(jnp.where(used, weights, 0), axis=3), axis=1)[..., :length]
        return out.reshape(query.shape), carry, sums

    hidden = model.apply({"params": params}, tokens, method="embed_tokens")
    xs = (recording.key, recording.value)
    return model.apply({"params": params}, hidden, positions, attend, None, xs, method="decode")[2]


@dataclasses.dataclass(frozen=True)
class AnswerAttention(Score):
    """The answer's own attention, which a replay of `with_answer_attention` hands over in place of the queries."""

    needs_attention = False

    def __call__(self, inputs: LayerInputs) -> jax.Array:
        group = inputs.query.shape[2] // inputs.key.shape[2]
        return inputs.query[:, :, ::group, 0].astype(jnp.float32).swapaxes(1, 2)


def with_answer_attention(recording: Recording, attention: jax.Array) -> Recording:
    """A recording for the oracle alone: in each query's first place lies what `answer_attention` gave its KV head."""
    group = recording.query.shape[3] // attention.shape[2]
    handed = jnp.repeat(attention.swapaxes(2, 3), group, axis=3).astype(jnp.float32)
    query = jnp.zeros(recording.query.shape, jnp.float32).at[..., 0].set(handed)
    return recording._replace(query=query)


def oracle(budget: Budget) -> Policy:
    """Keeps what the answer's rows attend to, as many tokens in every layer."""
    return Policy(name="oracle", budget=budget, score=AnswerAttention(), allocate=Uniform(), recent=0.0)


def oracle_by_mass(budget: Budget) -> Policy:
    """Keeps what the answer's rows attend to, the same share of their attention in every layer; see `EqualMass`."""
    return Policy(name="oracle_by_mass", budget=budget, score=AnswerAttention(), allocate=EqualMass(), recent=0.0)
