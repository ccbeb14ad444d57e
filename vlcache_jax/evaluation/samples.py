"""Samples of a data set, from files that users already have: JSON lines, VLMEvalKit's TSV, lmms-eval's parquet.

Files are read one sample after another, by the names of their columns, so that their size does not matter. Nothing is
decoded here: an image stays a path or a data URL until its turn.
"""

import ast
import csv
import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlcache_jax.errors import InputError, is_whole
from vlcache_jax.evaluation.parquet import read_parquet
from vlcache_jax.evaluation.sample import LETTERS, LONGEST, Sample
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.limits import DATA_URL_CHARACTERS
from vlcache_jax.files.reading import open_plain

_LINE_BYTES = 2**30


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The data files that paths, folders and patterns name, in their order, those of a folder by name.

    Raises:
      InputError: one of them names none.
    """
    found: list[Path] = []
    for given in paths:
        text = os.fspath(given)
        path = Path(text)
        inside = sorted(path.iterdir()) if path.is_dir() else [Path(name) for name in sorted(glob.glob(text))]
        files = [file for file in inside if file.suffix.lower() in READERS]
        if path.is_file() and not files:
            raise InputError(f"{text} is none of {', '.join(READERS)}: name the file by its format")
        if not files:
            raise InputError(f"{text} names no file that ends in {', '.join(READERS)}: check the path")
        found += [file for file in files if file not in found]
    return found


def read_samples(files: Sequence[Path]) -> Iterator[Sample]:
    """All samples of some files, one after another.

    Raises:
      InputError: a file that cannot be read, a sample without a question, or an id that comes twice.
    """
    seen: dict[str, Path] = {}
    for file in files:
        try:
            for sample in READERS[file.suffix.lower()](file):
                if sample.id in seen:
                    also = "" if seen[sample.id] == file else f", also in {seen[sample.id]}"
                    raise InputError(f"{file}: the id {shorten(sample.id)} comes twice{also}: give each sample its own")
                seen[sample.id] = file
                yield sample
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} cannot be read: {error}") from error


def _json_lines(file: Path) -> Iterator[Sample]:
    """An object a line: `question` or `messages`, and perhaps id, images, videos, answers, choices, max_new_tokens."""
    with open_plain(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                values = parse_json(line, _LINE_BYTES)
            except ValueError as error:
                raise InputError(f"{place}: {error}: expected one JSON object a line") from error
            if not isinstance(values, dict):
                raise InputError(f"{place} is {shorten(values)}: expected a JSON object")
            yield _from_object(values, number, place, file.parent)


def _from_object(values: dict[str, Any], number: int, place: str, folder: Path) -> Sample:
    visual = ("images", "image", "videos", "video")
    names = ("id", *visual, "question", "messages", "answers", "answer", "choices", "max_new_tokens")
    own = {name: values[name] for name in names if values.get(name) is not None}
    pairs = (("images", "image"), ("videos", "video"), ("answers", "answer"))
    images, videos, answers = (_texts(own, several, one, place) for several, one in pairs)
    messages = own.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{place}: messages={shorten(messages)}: expected a list of objects")
    if not isinstance(own.get("question", ""), str) or bool(own.get("question")) == bool(messages):
        raise InputError(
            f"{place}: expected a question, which is a text, or messages; it has {shorten(sorted(values))}"
        )
    most = own.get("max_new_tokens")
    if most is not None and not is_whole(most, 1):
        raise InputError(f"{place}: max_new_tokens={shorten(most)}: expected a whole number of at least 1")
    return Sample(
        id=str(own.get("id", number)),
        images=tuple(text if text.startswith("data:") else str(folder / text) for text in images),
        videos=tuple(str(folder / text) for text in videos),
        question=own.get("question", ""),
        messages=tuple(messages),
        answers=answers,
        choices=_texts(own, "choices", "choices", place),
        max_new_tokens=most,
        more={name: value for name, value in values.items() if name not in names},
    )


def _texts(values: dict[str, Any], several: str, one: str, place: str) -> tuple[str, ...]:
    found = values.get(several, values.get(one, []))
    found = [found] if isinstance(found, str | int | float) else found
    if not isinstance(found, list) or not all(isinstance(x, str | int | float) for x in found):
        raise InputError(f"{place}: {several}={shorten(found)}: expected a list of texts")
    return tuple(map(str, found))


def _tsv(file: Path) -> Iterator[Sample]:
    """VLMEvalKit's layout: index, question, answer, image: base64, a list of several, or another row's index."""
    repeated = {text for row in _rows(file) for text in _images(row.get("image", "")) if len(text) <= 64}
    known = {"index", "question", "image", "image_path", "answer", *LETTERS, None}
    kept: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(_rows(file), 1):
        images = _images(row.get("image", ""))
        if len(images) == 1 and images[0] in kept:
            images = kept[images[0]]
        name = row.get("index") or str(number)
        if name in repeated:
            kept[name] = images
        paths = _images(row.get("image_path", "")) if not images else ()
        choices = tuple(row[letter] for letter in LETTERS if row.get(letter) not in (None, ""))
        if not row.get("question"):
            raise InputError(f"{file}, row {number}: there is no question: it has {shorten(sorted(row))}")
        answer = row.get("answer") or ""
        yield Sample(
            id=name,
            images=(
                *(f"data:image/png;base64,{text}" for text in images),
                *(str(file.parent / path) for path in paths),
            ),
            question=row["question"],
            answers=_images(answer) if answer.startswith("[") else ((answer,) if answer else ()),
            choices=choices,
            more={name: value for name, value in row.items() if name not in known and value and len(value) <= LONGEST},
        )


def _rows(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(DATA_URL_CHARACTERS)
    with open_plain(file) as binary, io.TextIOWrapper(binary, "utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t")
        missing = {"question"} - set(rows.fieldnames or ())
        if missing:
            names = ", ".join(map(str, rows.fieldnames or ()))
            raise InputError(f"{file} has no column question, as VLMEvalKit's layout has; its columns are: {names}")
        yield from rows


def _images(text: str) -> tuple[str, ...]:
    """A text, or the texts of a list as Python writes it."""
    if text.startswith("["):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return (text,)
        return tuple(map(str, found)) if isinstance(found, list) else (text,)
    return (text,) if text else ()


READERS = {".jsonl": _json_lines, ".tsv": _tsv, ".parquet": read_parquet}
"""By the ending of a file's name."""
