"""The checkpoint and the questions that ship with the package."""

import dataclasses
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.inputs import Batch
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.models.processor import Processor

MODEL, IMAGES, QUESTIONS = "demo_model", "demo_images", "questions.json"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the demo.

    Attributes:
      task: what it is about, in a word.
      images: the images, upright RGB.
      question: the user's message.
      expected: the right answer; None for a question of the user's own.
    """

    task: str
    images: list[Image.Image]
    question: str
    expected: str | None


def demo_assets(folder: str | None) -> Path:
    """The folder with the demo's checkpoint and images.

    Raises CheckpointError if it has no checkpoint.
    """
    path = Path(str(resources.files("vlcache_jax") / "assets")) if folder is None else Path(folder)
    if not (path / MODEL).is_dir():
        raise CheckpointError(
            f"there is no demo checkpoint in {path / MODEL}: train one with `vlcache-jax train-demo` and give its "
            "folder as --assets, or ask a checkpoint of yours with `vlcache-jax generate --model DIR`"
        )
    return path


def read_questions(folder: Path) -> list[Question]:
    """The questions that `questions.json` lists: [{"images": ["a.png"], "question": ..., "answer": ..., "task": ...}].

    Raises InputError if the file is missing or malformed, or an image cannot be read.
    """
    path = folder / QUESTIONS
    try:
        entries = parse_json(read_plain(path))
        if not isinstance(entries, list) or not entries:
            raise ValueError("it is no list, or an empty one")
        for number, entry in enumerate(entries):
            _check_entry(number, entry)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no list of questions ({error}): restore it from the package") from error
    return [
        Question(
            entry["task"],
            [load_image(folder / name, f"question {number}") for name in entry["images"]],
            entry["question"],
            entry["answer"],
        )
        for number, entry in enumerate(entries)
    ]


def _check_entry(number: int, entry: Any) -> None:
    """Raises ValueError for what is no question."""
    texts = isinstance(entry, dict) and all(isinstance(entry.get(x), str) for x in ("task", "question", "answer"))
    if not texts or not isinstance(entry.get("images"), list) or not entry["images"]:
        raise ValueError(f"question {number} is {shorten(entry)}, without a task, images, a question and an answer")
    for name in entry["images"]:
        if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
            raise ValueError(f"question {number} names the image {shorten(name)}, which is no file beside it")


def make_batch(processor: Processor, questions: list[Question]) -> Batch:
    """A prompt for each question: its images, then the text."""
    return processor.chat(
        [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in question.images),
                        {"type": "text", "text": question.question},
                    ],
                }
            ]
            for question in questions
        ]
    )


def checksum(folder: Path) -> str:
    """Of the weights: results of different checkpoints must not be mixed."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            total = zlib.crc32(read_plain(path), total)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return f"{total:08x}"
