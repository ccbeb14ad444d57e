"""Held-out samples of the demo's tasks as batches, and how their answers are scored."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vlcache_jax.demo.data.samples import HELD_OUT_SEED, make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.evaluation.metrics import anls, cider_d, exact_match
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.io.loading import VLM

Scorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]

DEFAULT_TASKS = ("documents", "prices", "scenes", "places")
"""What the study measures unless told otherwise: reading, mathematics and captions, the paper's three families; and
localisation."""

_ROOM = 2  # tokens that an answer may be longer than the longest right one, at least
_STEP = 4  # room for answers is a multiple of this: few programs for many tasks
_BUCKET = 32  # prompts of all tasks are padded to multiples of this


def _value(text: str) -> str:
    """An answer without its first word, the name that was asked for, which is no merit."""
    return " ".join(text.split()[1:])


def _each(score: Callable[[str, str], float], part: Callable[[str], str] = str) -> Scorer:
    def scorer(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([score(part(text), part(answer)) for text, answer in zip(texts, answers, strict=True)])

    return scorer


def _caption(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    return cider_d(texts, [[answer] for answer in answers])


EXACT: Scorer = _each(exact_match)

SCORES: dict[str, tuple[str, Scorer]] = {
    "documents": ("ANLS", _each(anls, _value)),
    "document_pairs": ("ANLS", _each(anls, _value)),
    "scenes": ("CIDEr", _caption),
    "places": ("accuracy", _each(exact_match, _value)),
    "prices": ("accuracy", _each(exact_match, lambda text: text.rpartition("=")[2])),
}
"""The score of a task besides exact match, and its name; accuracy of the whole answer for tasks that are not here.

Documents and places: of what follows the name asked for. Prices: of the sum.
"""


def score_name(task: str) -> str:
    """What the score of a task is called."""
    return SCORES.get(task, ("accuracy", EXACT))[0]


def score(task: str, texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The task's own score of each answer, f64 [samples]: CIDEr-D in [0, 10], the others in [0, 1]."""
    return SCORES.get(task, ("accuracy", EXACT))[1](texts, answers)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's samples.

    Attributes:
      name: one of the demo's tasks.
      batches: all of one shape; the last one is filled up with its last sample.
      answers: the right answer of each sample.
      max_new_tokens: room for the longest right answer, and a little more.
    """

    name: str
    batches: list[Batch]
    answers: list[str]
    max_new_tokens: int

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.answers)


def load_task(vlm: VLM, name: str, samples: int, batch_size: int, seed: int = HELD_OUT_SEED) -> TaskData:
    """Draws the first `samples` held-out samples of a task.

    Args:
      vlm: the checkpoint, for its processor.
      name: one of `vlcache_jax.demo.data.samples.TASKS`.
      samples: how many.
      batch_size: prompts of a batch at most; batches are as equal as they can be.
      seed: of the data set.
    """
    count = -(-samples // batch_size)
    size = -(-samples // count)
    drawn = [make_sample(name, seed, i, max_questions=1) for i in range(samples)]
    asked = [prompt(sample.questions[0][0], len(sample.images)) for sample in drawn]
    answers = [sample.questions[0][1] for sample in drawn]
    batches = []
    for start in range(0, samples, size):
        numbers = list(range(start, min(start + size, samples)))
        filled = [*numbers, *[numbers[-1]] * (size - len(numbers))]
        batches.append(vlm.processor(images=[list(drawn[i].images) for i in filled], text=[asked[i] for i in filled]))
    length = max(-(-int(np.max(batch.lengths)) // _BUCKET) * _BUCKET for batch in batches)
    longest = max(len(vlm.processor.tokenizer.encode(answer, False)) for answer in answers)
    room = -(-(longest + 1 + _ROOM) // _STEP) * _STEP
    return TaskData(name, [_with_length(batch, length) for batch in batches], answers, room)


def _with_length(batch: Batch, length: int) -> Batch:
    """Pads the prompts to another length, or cuts padding off."""
    kept = min(length, batch.length)
    more = ((0, 0), (0, length - kept))
    return dataclasses.replace(
        batch,
        tokens=np.pad(np.asarray(batch.tokens)[:, :kept], more),
        vision_index=np.pad(np.asarray(batch.vision_index)[:, :kept], more, constant_values=TEXT),
    )
