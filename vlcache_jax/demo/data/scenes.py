"""Scenes: a few coloured shapes among grey clutter, to be listed in reading order or counted."""

import numpy as np

from vlcache_jax.demo.data import canvas
from vlcache_jax.demo.data.labels import PatchLabels
from vlcache_jax.demo.data.pages import Drawn, Questions
from vlcache_jax.demo.data.words import COLOURS, COUNT_QUESTIONS, FILLERS, SCENE_QUESTIONS, SHAPES, plural

_PATCH = 32


def scene(rng: np.random.Generator, grid: int, *, counts_first: bool) -> tuple[list[Drawn], Questions]:
    """A scene with 3 to 5 shapes, and questions to list them and to count them."""
    tint = rng.integers(-25, 1, 3) + int(rng.integers(190, 241))
    image = canvas.paper(rng, grid * _PATCH, grid * _PATCH, tuple(int(c) for c in tint))
    labels = PatchLabels.empty(grid * grid)
    _clutter(rng, image, grid)

    cells = np.sort(rng.choice(grid * grid, int(rng.integers(3, 6)), replace=False))
    kinds = rng.permutation(SHAPES)[: int(rng.integers(2, 5))]  # some repeat, so that counting has a point
    found = []
    for cell in cells:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(kinds))
        radius = int(rng.integers(11, 15))
        y, x = (_PATCH * int(i) + _PATCH // 2 - radius + int(rng.integers(-2, 2)) for i in divmod(cell, grid))
        ink = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
        canvas.blend(image, canvas.shape_mask(shape, radius), y, x, tuple(int(c) for c in ink))
        labels.colour[cell] = 1 + list(COLOURS).index(colour)
        labels.shape[cell] = 1 + SHAPES.index(shape)
        found.append((colour, shape))

    caption = ", ".join(f"{colour} {shape}" for colour, shape in found)
    lists = [(SCENE_QUESTIONS[i], caption) for i in rng.permutation(len(SCENE_QUESTIONS))]
    counts = [_count_question(rng, [shape for _, shape in found]) for _ in range(6)]
    if counts_first:
        lists, counts = counts, lists
    return [(image, labels)], [lists[0], lists[1], *counts, *lists[2:]]


def _count_question(rng: np.random.Generator, present: list[str]) -> tuple[str, str]:
    asked = [str(s) for s in rng.permutation(SHAPES)[:3]]
    question = COUNT_QUESTIONS[rng.integers(len(COUNT_QUESTIONS))].format(*map(plural, asked))
    return question, ", ".join(str(present.count(shape)) for shape in asked)


def _clutter(rng: np.random.Generator, image: np.ndarray, grid: int) -> None:
    """Grey lines, words, blobs and outlines: nothing in colour."""
    side = grid * _PATCH
    for _ in range(int(rng.integers(grid, 4 * grid))):
        grey = int(rng.integers(60, 190))
        ink = (grey, grey, grey)
        y, x = (int(i) for i in rng.integers(0, side - 8, 2))
        match rng.integers(5):
            case 0:
                canvas.rule(image, y, x, int(rng.integers(10, 120)), ink)
            case 1:
                canvas.rule(image, y, x, int(rng.integers(10, 120)), ink, vertical=True)
            case 2:
                canvas.text(image, str(rng.choice(FILLERS)), y, x, ink)
            case 3:
                shape = str(rng.choice(SHAPES))
                canvas.blend(image, canvas.shape_mask(shape, int(rng.integers(3, 9))), y, x, ink)
            case _:
                canvas.box(image, y, x, int(rng.integers(6, 60)), int(rng.integers(6, 60)), ink)
