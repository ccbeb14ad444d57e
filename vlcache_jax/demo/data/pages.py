"""Rendered documents and price lists: named fields in a jittered layout, among clutter.

row of patches   | INVO | ICE  | 4821 |      | PAGE | TAX  | 4207 | ----- |
                   name (1 or 2 patches), value (1 patch), gaps, filler words, rules
"""

from collections.abc import Callable

import numpy as np

from vlcache_jax.demo.data import canvas
from vlcache_jax.demo.data.font import GLYPH_HEIGHT, PITCH
from vlcache_jax.demo.data.labels import CELL, WORDS, PatchLabels
from vlcache_jax.demo.data.words import (
    DOCUMENT_QUESTIONS,
    FILLERS,
    ITEMS,
    NAMES,
    PLACE_QUESTIONS,
    PRICE_QUESTIONS,
    TITLES,
)

Drawn = tuple[np.ndarray, PatchLabels]
Questions = list[tuple[str, str]]

_PATCH = 32
_WORD_INDEX = {word: i for i, word in enumerate(WORDS)}


def documents(rng: np.random.Generator, grid: int, count: int) -> tuple[list[Drawn], Questions]:
    """`count` pages with different field names each, and a question for every field, in random order."""
    names = [str(n) for n in rng.permutation(NAMES)]
    share = min(len(names) // count, _most_fields(grid))
    drawn, values = [], {}
    for i in range(count):
        some = names[i * share : (i + 1) * share]
        # Small pages, which training starts with, often show a single field: copying comes before looking up.
        least = 1 if grid <= 6 else _least_fields(grid)
        image, labels, on_page = _page(rng, grid, some, _four_digits(rng, len(some)), least)
        drawn.append((image, labels))
        values |= on_page
    asked = [str(name) for name in rng.permutation(list(values))]
    asked += asked[: 6 - len(asked)] if grid <= 6 else []
    return drawn, [
        (DOCUMENT_QUESTIONS[rng.integers(len(DOCUMENT_QUESTIONS))].format(name), f"{name} {values[name]}")
        for name in asked
    ]


def places(rng: np.random.Generator, grid: int) -> tuple[list[Drawn], Questions]:
    """A page, and questions for where its fields are: row and column, from 1, of the coarse cell of the value."""
    drawn, fields = documents(rng, grid, 1)
    patches = {WORDS[owner - 1]: patch for patch, owner in enumerate(drawn[0][1].owner) if owner}
    questions = []
    for _, answer in fields:
        name = answer.split()[0]
        row, column = divmod(patches[name], grid)
        question = PLACE_QUESTIONS[rng.integers(len(PLACE_QUESTIONS))].format(name)
        questions.append((question, f"{name} {row // CELL + 1}, {column // CELL + 1}"))
    return drawn, questions


def price_list(rng: np.random.Generator, grid: int) -> tuple[list[Drawn], Questions]:
    """A page of one-digit prices, and questions for the sum of two of them."""
    items = [str(n) for n in rng.permutation(ITEMS)][: _most_fields(grid)]
    digits = [str(d) for d in rng.integers(1, 10, len(items))]
    image, labels, prices = _page(rng, grid, items, digits, 2 if grid <= 6 else _least_fields(grid))
    listed, questions = list(prices), []
    for _ in range(12):
        a, b = rng.choice(listed, 2, replace=False)
        question = PRICE_QUESTIONS[rng.integers(len(PRICE_QUESTIONS))].format(a, b)
        questions.append((question, f"{a} {prices[a]} + {b} {prices[b]} = {int(prices[a]) + int(prices[b])}"))
    return [(image, labels)], questions


def _most_fields(grid: int) -> int:
    return min(len(NAMES), max(2, grid * grid // 6 + (grid > 12) * 8))


def _least_fields(grid: int) -> int:
    return grid // 2


def _four_digits(rng: np.random.Generator, count: int) -> list[str]:
    """Values of four digits; about half share their first two or three with others of the page."""
    prefixes = rng.integers(10, 100, 3)
    values = []
    for _ in range(count):
        if rng.random() < 0.5:
            values.append(int(rng.choice(prefixes)) * 100 + int(rng.integers(100)))
        else:
            values.append(int(rng.integers(1000, 10_000)))
    return [str(v) for v in values]


def _page(
    rng: np.random.Generator, grid: int, names: list[str], values: list[str], least: int
) -> tuple[np.ndarray, PatchLabels, dict[str, str]]:
    """Draws a page with some of the fields; returns those that found room."""
    tint = rng.integers(-10, 6, 3) + int(rng.integers(222, 241))
    image = canvas.paper(rng, grid * _PATCH, grid * _PATCH, tuple(int(c) for c in tint))
    ink = tuple(int(c) for c in rng.integers(0, 70, 3))
    pale = tuple(int(c) for c in rng.integers(120, 200, 3))
    labels = PatchLabels.empty(grid * grid)
    _decorate(rng, image, grid, pale)

    wanted = int(rng.integers(least, len(names) + 1))
    if grid <= 6:
        wanted = min(wanted, int(rng.integers(least, len(names) + 1)))
    pending = list(zip(names, values, strict=True))[:wanted][::-1]
    density = min(1.0, wanted / (grid * grid / 4) + rng.uniform(0, 0.3))
    placed: dict[str, str] = {}
    boxed = rng.random() < 0.3
    for row in rng.permutation(grid):
        baseline = int(row) * _PATCH + 9 + int(rng.integers(-3, 4))
        column = int(rng.integers(0, 2))
        while column < grid:
            room = grid - column
            if pending and rng.random() < density:
                name, value = pending[-1]
                cells = -(-len(name) // 4)
                if cells + 1 > room:
                    break
                pending.pop()
                _field(rng, image, labels, grid, (int(row), column), baseline, name, value, ink)
                if boxed:
                    canvas.box(image, int(row) * _PATCH, column * _PATCH, _PATCH, (cells + 1) * _PATCH, pale)
                placed[name] = value
                column += cells + 1
            elif rng.random() < 0.5:
                filler = str(rng.choice(FILLERS))
                column += _clutter(rng, image, (int(row), column), baseline, filler, ink, pale)
            column += int(rng.random() < 0.35)
    if len(placed) < min(least, 2):  # an unlucky layout: sums need two fields
        return _page(rng, grid, names, values, least)
    return image, labels, placed


def _field(
    rng: np.random.Generator,
    image: np.ndarray,
    labels: PatchLabels,
    grid: int,
    cell: tuple[int, int],
    baseline: int,
    name: str,
    value: str,
    ink: canvas.Colour,
) -> None:
    row, column = cell
    cells = -(-len(name) // 4)
    index = _WORD_INDEX[name]
    # Eight letters take 56 of 64 pixels: the second half of a name starts four letters in, not at the patch border.
    slack = cells * _PATCH - PITCH * len(name)
    canvas.text(image, name.upper(), baseline, column * _PATCH + int(rng.integers(0, min(slack, 3) + 1)), ink)
    at = row * grid + column
    for half in range(cells):
        labels.word[at + half] = 1 + 2 * index + half
    left = (column + cells) * _PATCH
    slack = _PATCH - PITCH * len(value)
    canvas.text(image, value, baseline, left + int(rng.integers(0, min(slack, 3) + 1)), ink)
    labels.owner[at + cells] = 1 + index
    labels.digits[at + cells, : len(value)] = [1 + int(d) for d in value]


def _decorate(rng: np.random.Generator, image: np.ndarray, grid: int, pale: canvas.Colour) -> None:
    """Bands, ruled lines and a margin behind the text."""
    side = grid * _PATCH
    style = rng.integers(4)
    if style == 0:
        for y in range(int(rng.integers(2)) * _PATCH, side, 2 * _PATCH):
            image[y : y + _PATCH] -= np.uint8(14)
    elif style == 1:
        for y in range(_PATCH - 1, side, _PATCH):
            canvas.rule(image, y, 0, side, pale)
    for _ in range(int(rng.integers(0, 3))):
        canvas.rule(image, 0, int(rng.integers(grid)) * _PATCH, side, pale, vertical=True)
    if grid >= 10 and rng.random() < 0.3:  # a pale title behind the text, like a watermark
        title = str(rng.choice(TITLES))
        ghost = tuple(int(c) for c in image[0, 0].astype(int) - 26)
        canvas.text(image, title, int(rng.integers(side - 90)), int(rng.integers(0, 40)), ghost, scale=4)


def _clutter(
    rng: np.random.Generator,
    image: np.ndarray,
    cell: tuple[int, int],
    baseline: int,
    filler: str,
    ink: canvas.Colour,
    pale: canvas.Colour,
) -> int:
    """Draws something that is not a field; returns how many patches it took."""
    row, column = cell
    y, x = row * _PATCH, column * _PATCH
    kinds: list[Callable[[], None]] = [
        lambda: canvas.text(image, filler, baseline, x + int(rng.integers(0, 4)), ink),
        lambda: canvas.text(image, filler, baseline, x + int(rng.integers(0, 4)), pale),
        lambda: canvas.rule(image, baseline + GLYPH_HEIGHT, x, _PATCH, ink),
        lambda: canvas.box(image, y + 6, x + 4, 20, 24, pale),
    ]
    kind = int(rng.integers(len(kinds)))
    kinds[kind]()
    return -(-len(filler) // 4) if kind < 2 else 1
