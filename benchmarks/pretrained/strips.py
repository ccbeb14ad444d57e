"""Pictures for a small VLM: strips of the demo's pages, and for each visual token the text that its patch shows.

A strip is 4 of a page's 16 columns, stretched to a square of 256 x 256 pixels: 16 rows of 16 patches. A cell of the
page, four characters wide, lies then under four visual tokens: a value's four digits, which are four tokens of the
decoder's, have one patch each. The tokens of a name end one patch before its value, and everything else is a space:

    page    | TOTAL ..      | 4821          |      patches   _ _ _ _ _ _ total _ | 4 8 2 1 | _ _ _ _
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.demo.data.labels import WORDS
from vlcache_jax.demo.data.samples import FULL_GRID, PATCH, make_sample
from vlcache_jax.demo.data.words import DOCUMENT_QUESTIONS, PRICE_QUESTIONS

COLUMNS = 4  # of a page in a strip
IMAGE_SIZE, PATCH_SIZE = 256, 16
TASKS = ("documents", "prices")


@dataclasses.dataclass(frozen=True)
class Strip:
    """A part of a page.

    Attributes:
      image: u8 [256, 256, 3].
      fields: (row, column of the value, name, value) of those that lie in it as a whole.
      questions: (question, answer) pairs, as the demo asks them.
    """

    image: np.ndarray
    fields: list[tuple[int, int, str, str]]
    questions: list[tuple[str, str]]


def strips(task: str, seed: int, index: int) -> list[Strip]:
    """The strips of page `index` with at least two fields, of four side by side; a function of the arguments."""
    sample = make_sample(task, seed, index, max_questions=1)
    rng = np.random.default_rng([seed, TASKS.index(task), index, 7])
    found = [_strip(sample, task, first, rng) for first in range(0, FULL_GRID, COLUMNS)]
    return [strip for strip in found if len(strip.fields) > 1]


def _strip(sample: Any, task: str, first: int, rng: np.random.Generator) -> Strip:
    columns = slice(first, first + COLUMNS)
    owner, digits = (
        np.reshape(x, (FULL_GRID, FULL_GRID, -1))[:, columns] for x in (sample.labels.owner, sample.labels.digits)
    )
    fields = []
    for row, column in np.argwhere(owner[..., 0]).tolist():
        name = WORDS[owner[row, column, 0] - 1]
        if -(-len(name) // 4) <= column:
            fields.append((row, column, name, "".join(str(digit - 1) for digit in digits[row, column] if digit)))
    page = sample.images[0][:, first * PATCH : (first + COLUMNS) * PATCH].astype(np.uint16)
    image = ((page[::2] + page[1::2]) // 2).repeat(2, axis=1).astype(np.uint8)
    return Strip(image, fields, _questions(task, fields, rng) if len(fields) > 1 else [])


def _questions(task: str, fields: list[tuple[int, int, str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    asked = []
    for number in rng.permutation(len(fields)):
        _, _, name, value = fields[number]
        if task == "documents":
            question = DOCUMENT_QUESTIONS[rng.integers(len(DOCUMENT_QUESTIONS))].format(name)
            asked.append((question, f"{name} {value}"))
            continue
        _, _, other, price = fields[rng.choice([i for i in range(len(fields)) if i != number])]
        question = PRICE_QUESTIONS[rng.integers(len(PRICE_QUESTIONS))].format(name, other)
        asked.append((question, f"{name} {value} + {other} {price} = {int(value) + int(price)}"))
    return asked


def shown(strip: Strip, tokenizer: Any) -> np.ndarray:
    """Token ids i32 [256]: what every patch shows of the strip's fields; names as they stand within a sentence."""
    (space,) = tokenizer.encode(" ", False)
    ids = np.full((FULL_GRID, FULL_GRID), space, np.int32)
    for row, column, name, value in strip.fields:
        ids[row, 4 * column : 4 * column + len(value)] = tokenizer.encode(value, False)
        word = tokenizer.encode(f" {name}", False)
        ids[row, 4 * column - 1 - len(word) : 4 * column - 1] = word
    return ids.reshape(-1)


def asked(strip: Strip) -> list[dict[str, Any]]:
    """The conversation that asks a strip's first question."""
    image = {"type": "image", "image": Image.fromarray(strip.image)}
    return [{"role": "user", "content": [image, {"type": "text", "text": strip.questions[0][0]}]}]


def stream(seed: int, start: int = 0, tasks: tuple[str, ...] = TASKS) -> Iterator[Strip]:
    """Endless strips, pages of the tasks in turn from page `start` on."""
    for index in itertools.count(start):
        yield from strips(tasks[index % len(tasks)], seed, index)
