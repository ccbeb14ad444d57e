"""Seeded samples of the demo's tasks: images, questions, answers, and what every patch shows.

A sample is a pure function of (task, seed, index, grid). Images are `grid` x `grid` patches; the full size is
`FULL_GRID`, smaller ones are what training starts with.
"""

import dataclasses
import zlib

import numpy as np

from vlcache_jax.demo.data import pages, scenes
from vlcache_jax.demo.data.labels import PatchLabels

PATCH = 32
FULL_GRID = 16
IMAGE_MEAN, IMAGE_STD = 0.85, 0.25
"""Of all channels, for pixels in [0, 1]: pages are mostly paper, so this centres them."""

HELD_OUT_SEED = 1_000_003
"""Of the samples that evaluation draws; training never uses it."""

TASKS = ("documents", "document_pairs", "prices", "scenes", "counts", "places")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt's images with the questions that can be asked about them.

    Attributes:
      images: uint8 [images, 32 * grid, 32 * grid, 3].
      labels: what the patches show; arrays [images, grid², ...].
      questions: (question, answer) pairs, the first one being the sample's question proper.
    """

    images: np.ndarray
    labels: PatchLabels
    questions: tuple[tuple[str, str], ...]


def make_sample(task: str, seed: int, index: int, grid: int = FULL_GRID, max_questions: int = 12) -> Sample:
    """Sample number `index` of a task.

    Args:
      task: one of `TASKS`.
      seed: of the data set.
      index: of the sample in the data set, >= 0.
      grid: patches along a side of the image, 4 to 16.
      max_questions: how many questions to ask about the images at most.

    Raises:
      ValueError: `task` is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), index])
    match task:
        case "documents":
            drawn, questions = pages.documents(rng, grid, 1)
        case "document_pairs":
            drawn, questions = pages.documents(rng, grid, 2)
        case "places":
            drawn, questions = pages.places(rng, grid)
        case "prices":
            drawn, questions = pages.price_list(rng, grid)
        case "scenes":
            drawn, questions = scenes.scene(rng, grid, counts_first=False)
        case _:
            drawn, questions = scenes.scene(rng, grid, counts_first=True)
    images, labels = zip(*drawn, strict=True)
    return Sample(np.stack(images), PatchLabels.stack(labels), tuple(questions[:max_questions]))
