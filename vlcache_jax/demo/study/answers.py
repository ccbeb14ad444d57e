"""Answers of replayed prompts: with the question in the prompt that is compressed, or asked when that has been done."""

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.store import PackedStore
from vlcache_jax.demo.study.recording import Recording, Replay, first_columns
from vlcache_jax.inference.generate import answer
from vlcache_jax.inference.prefill import compress
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inputs import TEXT, Batch, Continuation
from vlcache_jax.policies import Policy
from vlcache_jax.typing import Params, VisionLanguageModel

Answers = tuple[jax.Array, jax.Array, tuple[PackedStore, ...], jax.Array]
"""Tokens i32 [batch, max_new_tokens], lengths i32 [batch], the stores of the context, density f32 [batch, layers]."""


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


def split(batch: Batch) -> tuple[Batch, Continuation]:
    """The prompts up to their images' end, and the text after them."""
    end = images_end(batch)
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
    index = np.asarray(batch.vision_index)[:, :end]
    first = Batch(tokens[:, :end], np.full_like(lengths, end), index, batch.pixels)
    return first, Continuation(jnp.asarray(tokens[:, end : lengths.max()]), jnp.asarray(lengths - end))


def answer_known(
    model: Replay,
    params: Params,
    batch: Batch,
    recording: Recording,
    policy: Policy,
    max_new_tokens: int,
    question: Continuation | None = None,
) -> Answers:
    """Answers as `generate` gives them, with a cache that was compressed with all of the prompt.

    Args:
      model: the replay of the model.
      params: the model's own parameters.
      batch: prompts.
      recording: of the prompts.
      policy: what to keep of them; one that has them said twice needs their pixels.
      max_new_tokens: room for answers.
      question: appended to the compressed prompts, if there is one.
    """
    if policy.repeats:  # of which nothing was recorded
        ctx = compress(model.model, params, batch, policy)
    else:
        ctx = compress(model, {"model": params, "recording": recording}, batch, policy)
    out = answer(ctx, question, max_new_tokens)
    return out.tokens, out.lengths, ctx.stores, ctx.report.density


def answer_recipe(
    model: VisionLanguageModel, params: Params, batch: Batch, recipe: Recipe, max_new_tokens: int
) -> Answers:
    """Answers of the model itself, whose prompts a recipe changes: nothing can be replayed.

    With a pattern the density is that of what was listed.
    """
    ctx = compress(model, params, batch, recipe)
    out, listed = answer(ctx, None, max_new_tokens), ctx.report.prefill
    return out.tokens, out.lengths, ctx.stores, ctx.report.density if listed is None else listed.density


def answer_before(
    model: Replay, params: Params, batch: Batch, recording: Recording, policy: Policy, max_new_tokens: int
) -> Answers:
    """`answer_known` with a cache that was compressed before the question was there: up to the images' end."""
    first, question = split(batch)
    return answer_known(model, params, first, first_columns(recording, first.length), policy, max_new_tokens, question)
