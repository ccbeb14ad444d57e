"""What a train step eats, and packing several questions about one image behind it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inputs import TEXT, Batch


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TrainBatch:
    """Prompts with their answers. A pytree; every array has the batch as its first axis.

        tokens     <s> USER : <im> <im> | What ? ASSISTANT : 4 2 </s> | How ? ASSISTANT : 7 </s> <pad>
        segments    0   0   0   0    0     1   1     1     1 1 1   1     2  2     2     2 2   2     0
        positions   0   1   2   3    4     5   6     7     8 9 10 11     5  6     7     8 9  10     0
        targets                                          4 2 </s>                    7 </s>
        weights     0   0   0   0    0     0   0     0   4 1 1   0       0  0     0  4 1   0        0

    Several questions packed behind the same images (segments 1, 2, ...) see those (segment 0) and themselves only,
    and their positions go on from the images: each is exactly what it would be alone.

    Attributes:
      batch: prompts and answers, and the images.
      targets: i32 [batch, length]. The token that follows, where `weights` > 0.
      weights: f32 [batch, length]. Of each position in the loss; 0 wherever no answer token follows.
      segments: i32 [batch, length]; None of rows with one question each, which are plain causal text: on TPUs and
        GPUs that is what the fast attention kernels take.
      positions: i32 [batch, length]; None for the model's own.
    """

    batch: Batch
    targets: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    segments: jax.Array | np.ndarray | None = None
    positions: jax.Array | np.ndarray | None = None


class Conversation(NamedTuple):
    """Images with one or more questions, as token ids.

    Attributes:
      prefix: everything up to the questions, image tokens included.
      vision_index: of the prefix, see `Batch.vision_index`.
      questions: (what comes after the prefix, up to the answer; the answer with its end token) pairs.
      pixels: [tiles, height, width, 3].
    """

    prefix: Sequence[int]
    vision_index: Sequence[int]
    questions: Sequence[tuple[Sequence[int], Sequence[int]]]
    pixels: np.ndarray


def pack(
    conversations: Sequence[Conversation], length: int, *, pad_token: int = 0, first_weight: float = 1.0
) -> TrainBatch:
    """Builds a batch; questions that no longer fit into `length` are left out.

    Args:
      conversations: one for each row; their pixels must have equal shapes.
      length: of the rows.
      pad_token: fills the rest of a row.
      first_weight: of an answer's first token; the others weigh 1. The first one asks for the look-up, those after
        it can often be guessed from it.

    Raises:
      InputError: a row's first question does not fit, or an answer is empty.
    """
    size = len(conversations)
    tokens = np.full((size, length), pad_token, np.int32)
    vision_index = np.full((size, length), TEXT, np.int32)
    targets, segments, positions = (np.zeros((size, length), np.int32) for _ in range(3))
    weights = np.zeros((size, length), np.float32)
    lengths = np.zeros(size, np.int32)
    for row, conversation in enumerate(conversations):
        start = at = len(conversation.prefix)
        shortest = start + len(conversation.questions[0][0]) + len(conversation.questions[0][1])
        if shortest > length:
            raise InputError(f"row {row} needs {shortest} tokens and the rows have {length}: raise the length")
        tokens[row, :at] = conversation.prefix
        vision_index[row, :at] = conversation.vision_index
        positions[row, :at] = np.arange(at)
        for segment, (question, answer) in enumerate(conversation.questions, start=1):
            if not len(answer):
                raise InputError(f"row {row}: the answer of question {segment} is empty")
            end = at + len(question) + len(answer)
            if end > length:
                break
            first = at + len(question) - 1  # the row that predicts the answer's first token
            tokens[row, at:end] = [*question, *answer]
            segments[row, at:end] = segment
            positions[row, at:end] = np.arange(start, start + end - at)
            targets[row, first : end - 1] = answer
            weights[row, first : end - 1] = 1.0
            weights[row, first] = first_weight
            at = end
        lengths[row] = at
    pixels = np.stack([conversation.pixels for conversation in conversations])
    return TrainBatch(Batch(tokens, lengths, vision_index, pixels), targets, weights, segments, positions)
