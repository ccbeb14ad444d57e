"""Training batches from images, prompts and answers, by the processor of a loaded checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.rows import check_rows
from vlcache_jax.training.batch import Conversation, TrainBatch, pack


def make_train_batch(
    processor: Processor,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[str],
    answers: Sequence[str],
    length: int,
    *,
    pad_tiles_to: int | None = None,
) -> TrainBatch:
    """One example per row: the loss is on the answer and its end-of-sequence token only.

    Args:
      processor: `vlm.processor`.
      images: for each row its images, as for the processor.
      prompts: the whole prompts, image tokens included, up to where the answer starts.
      answers: what the model should say.
      length: padded length of the rows, prompt and answer together.
      pad_tiles_to: as for the processor.

    Returns:
      The batch, of numpy arrays.

    Raises:
      InputError: different numbers of rows, an empty answer, a row longer than `length`, or what the processor raises.

    Example:
      batch = make_train_batch(vlm.processor, [["a.png"]], ["USER: <image>\\nTotal? ASSISTANT:"], ["48.20"], 1024)
    """
    if len(prompts) != len(answers):
        raise InputError(f"{len(prompts)} prompts and {len(answers)} answers: give one answer for each prompt")
    return add_answers(
        processor, processor(images=images, text=list(prompts), pad_tiles_to=pad_tiles_to), answers, length
    )


def add_answers(processor: Processor, batch: Batch, answers: Sequence[str], length: int) -> TrainBatch:
    """`make_train_batch` of prompts that are a batch already, from `processor.chat` say.

    Example:
      batch = add_answers(vlm.processor, vlm.processor.chat(conversations), ["48.20"], length=1024)
    """
    if batch.size != len(answers):
        raise InputError(f"{batch.size} prompts and {len(answers)} answers: give one answer for each prompt")
    tokenizer = processor.tokenizer
    conversations = []
    for row, answer in enumerate(answers):
        if not answer.strip():
            raise InputError(f"row {row}: the answer is empty")
        tokens = np.asarray(batch.tokens[row, : batch.lengths[row]])
        index = np.asarray(batch.vision_index[row, : batch.lengths[row]])
        start = 1 + int(np.max(np.flatnonzero(index != TEXT), initial=0))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*tokenizer.encode(answer, False), *end]
        check_rows(ids, processor.embedding_rows, tokenizer, f"row {row}, the answer and its end")
        questions = [(tokens[start:].tolist(), ids)]
        pixels = np.asarray(batch.pixels[row])
        conversations.append(Conversation(tokens[:start].tolist(), index[:start].tolist(), questions, pixels))
    packed = pack(conversations, length, pad_token=processor.padding_id)
    missing = max(0, length - batch.length)
    features, shares = (
        None if value is None else np.pad(value[:, :length], ((0, 0), (0, missing), (0, 0)))
        for value in (batch.blend_index, batch.blend_weights)
    )
    seen = dataclasses.replace(packed.batch, cells=batch.cells, blend_index=features, blend_weights=shares)
    return dataclasses.replace(packed, batch=seen, segments=None, positions=None)  # the model's own
