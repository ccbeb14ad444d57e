"""The arguments of the processor in one form, checked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.opening import ImageLike, is_image_like
from vlcache_jax.models.images.video import Video

Visual = ImageLike | Video


def check_room(name: str, room: int | None, needed: int, what: str) -> None:
    if room is None:
        return
    if isinstance(room, bool) or not isinstance(room, (int, np.integer)) or room < needed:
        raise InputError(f"{name}={room!r} does not hold {needed} {what}: give a whole number at least that large")


def image_rows(images: Any, size: int, single: bool) -> list[list[Visual]]:
    """The images and videos of each of `size` prompts. `single`: the prompt was given as a str, not as a list."""
    if images is None:
        return [[] for _ in range(size)]
    if (is_image_like(images) or isinstance(images, Video)) and size == 1:
        return [[images]]
    if not isinstance(images, (list, tuple)):
        raise InputError(
            f"images is a {type(images).__name__} for {size} prompts: give a list with the images of each prompt"
        )
    if single and not any(isinstance(row, (list, tuple)) for row in images):
        return [list(images)]
    if len(images) != size:
        raise InputError(
            f"images has {len(images)} entries, but text has {size}: give one list of images per prompt, [] for none"
        )
    return [[] if row is None else list(row) if isinstance(row, (list, tuple)) else [row] for row in images]


def continuation_texts(text: Any) -> tuple[Sequence[str], tuple[int, ...]]:
    """The texts of `Processor.continuation` in one list, and the leading shape of its result."""
    rows = [text] if isinstance(text, str) else text
    nested = isinstance(rows, (list, tuple)) and bool(rows) and all(isinstance(row, (list, tuple)) for row in rows)
    texts = [item for row in rows for item in row] if nested else rows
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
        raise InputError(f"text is {str(text)[:80]!r}: give a text for each row, or a list of texts for each row")
    if nested and len({len(row) for row in rows}) > 1:
        raise InputError(f"the rows have {[len(row) for row in rows]} texts: give each row equally many")
    return texts, (len(rows), len(rows[0])) if nested else (len(rows),)


def token_rows(out: Any) -> list[np.ndarray]:
    """The token ids of each row of what `Processor.decode` takes, nested answers aside."""
    generated = hasattr(out, "tokens") and hasattr(out, "lengths")
    tokens = out.tokens if generated else out
    try:
        rows = [np.asarray(row) for row in (np.asarray(tokens) if hasattr(tokens, "shape") else tokens)]
    except (TypeError, ValueError):
        rows = [np.asarray(None)]
    if any(row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)) for row in rows):
        raise InputError(
            f"a {type(out).__name__} cannot be decoded: give generated output, an integer array [batch, "
            "steps] of token ids, or a list of lists of them"
        )
    if generated:
        lengths = np.asarray(out.lengths)
        if lengths.shape != (len(rows),):
            raise InputError(f"lengths has the shape {list(lengths.shape)} for {len(rows)} rows of tokens")
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return rows
