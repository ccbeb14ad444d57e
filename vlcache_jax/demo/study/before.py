"""Compression before the question is known: the prompt up to and including its images is compressed, then asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.store import PackedStore
from vlcache_jax.demo.study.recording import Recording, Replay, first_columns
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.policies import Policy
from vlcache_jax.typing import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """The text after the images: tokens i32 [batch, length], lengths i32 [batch]."""

    tokens: jax.Array
    lengths: jax.Array


def images_end(batch: Batch) -> int:
    """Tokens of a prompt up to and including its last visual token, which must be the same for all rows.

    Raises:
      ValueError: it is not, or a row has no image.
    """
    visual = np.asarray(batch.vision_index) != TEXT
    ends = visual.shape[1] - np.argmax(visual[:, ::-1], axis=1)
    if not visual.any(axis=1).all() or len(set(ends.tolist())) > 1:
        raise ValueError(f"images end after {sorted(set(ends.tolist()))} tokens: prompts of a task must agree on it")
    return int(ends[0])


def split(batch: Batch) -> tuple[Batch, Question]:
    """The prompts up to their images' end, and the rest."""
    end = images_end(batch)
    first = dataclasses.replace(
        batch,
        tokens=np.asarray(batch.tokens)[:, :end],
        lengths=np.full_like(np.asarray(batch.lengths), end),
        vision_index=np.asarray(batch.vision_index)[:, :end],
    )
    lengths = np.asarray(batch.lengths) - end
    longest = int(lengths.max())
    return first, Question(jnp.asarray(np.asarray(batch.tokens)[:, end : end + longest]), jnp.asarray(lengths))


def answer_before(
    model: Replay, params: Params, batch: Batch, recording: Recording, policy: Policy, max_new_tokens: int
) -> tuple[jax.Array, jax.Array, tuple[PackedStore, ...], jax.Array]:
    """Answers with a cache that was compressed before the question was there.

    Args:
      model: the replay of the model.
      params: the model's own parameters.
      batch: whole prompts.
      recording: of the whole prompts.
      policy: what to keep of the prompt up to its images' end.
      max_new_tokens: room for answers.

    Returns:
      (tokens i32 [batch, max_new_tokens], lengths i32 [batch], the stores of the compressed context, density f32
      [batch, layers]).
    """
    from vlcache_jax.inference.generate import answer
    from vlcache_jax.inference.prefill import compress

    first, question = split(batch)
    recorded = first_columns(recording, first.length)
    ctx = compress(model, {"model": params, "recording": recorded}, first, policy)
    out = answer(ctx, question, max_new_tokens)  # type: ignore[arg-type]
    return out.tokens, out.lengths, ctx.stores, ctx.report.density
