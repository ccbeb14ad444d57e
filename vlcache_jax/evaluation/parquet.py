"""lmms-eval's parquet files, by the names of their columns; read with pyarrow, which the extra `data` installs."""

import ast
import base64
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.sample import LONGEST, Sample

_ID = ("questionId", "question_id", "pid", "id", "index")
_IMAGES = ("image", "decoded_image", "images")
_ANSWERS = ("answers", "answer")
_CHOICES = ("options", "choices")
_ROWS = 8  # read at once: each holds images
_BOMB, _RATIO = 2**28, 1000  # bytes of a group of rows, and how much larger than the file they may be


def read_parquet(file: Path) -> Iterator[Sample]:
    """The rows of a file with a column `question`, or `image` alone for captions.

    Raises:
      InputError: pyarrow is missing, the file is none of its kind, or its columns are others.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{file} needs pyarrow: pip install 'vlcache-jax[data]'") from error
    try:
        with ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if "question" not in names and not set(_IMAGES) & set(names):
                raise InputError(
                    f"{file} has neither a column question nor one of {', '.join(_IMAGES)}, as lmms-eval's layouts "
                    f"have; its columns are: {', '.join(names)}"
                )
            _check_sizes(file, opened.metadata)
            number = 0
            for batch in opened.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield _sample(row, f"{file.stem}-{number}")
    except ArrowException as error:
        raise InputError(f"{file} is no parquet file that can be read: {error}") from error


def _check_sizes(file: Path, metadata: Any) -> None:
    """Refuses rows that become a thousand times as large as the file when they are read."""
    packed = file.stat().st_size
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size  # of columns nothing is asked: pyarrow aborts on damaged ones
        if size > max(_BOMB, _RATIO * packed):
            raise InputError(
                f"{file}: {packed:,} bytes become {size:,} when they are read, which no questions or images do: it is "
                "not read"
            )


def _sample(row: dict[str, Any], name: str) -> Sample:
    known = {*_ID, *_IMAGES, *_ANSWERS, *_CHOICES, "question"}
    numbered = sorted(
        (key for key in row if key.startswith("image_") and key[6:].isdecimal()), key=lambda x: int(x[6:])
    )
    if row.get("decoded_image") is not None:  # MathVista, whose `image` is the path of a file that is not there
        row = {**row, "image": None}
    images = [image for key in (*_IMAGES, *numbered) if row.get(key) is not None for image in _list(row[key])]
    more = {key: value for key, value in row.items() if key not in known and _is_short(value)}
    return Sample(
        id=str(next((row[key] for key in _ID if row.get(key) is not None), name)),
        images=tuple(_image(image) for image in images),
        question=row.get("question") or "",
        answers=tuple(map(str, _list(next((row[key] for key in _ANSWERS if row.get(key) is not None), [])))),
        choices=tuple(map(str, _list(next((row[key] for key in _CHOICES if row.get(key) is not None), [])))),
        more=more,
    )


def _is_short(value: Any) -> bool:
    """Whether a value is copied to the result: a finite number, which JSON has, or a short text."""
    return math.isfinite(value) if isinstance(value, int | float) else isinstance(value, str) and len(value) <= LONGEST


def _list(value: Any) -> Sequence[Any]:
    """What a column holds as a list, which may be written as a text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        return found if isinstance(found, list) else [value]
    return value if isinstance(value, list) else [value]


def _image(value: Any) -> str:
    """A data URL, or the path of an image that lies elsewhere."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return str(value.get("path") if isinstance(value, dict) else value)
