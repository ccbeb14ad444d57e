"""A picture of what several methods kept of one sample, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.demo.data.samples import FULL_GRID, HELD_OUT_SEED, make_sample
from vlcache_jax.demo.study.drawing import GREY, Sheet, text_width
from vlcache_jax.demo.study.methods import Method
from vlcache_jax.errors import InputError

_MARGIN, _TILE, _GAP = 48, 216, 14
_HOT = np.array((222, 91, 36), np.float32)


def kept_tokens(task: str, budget: float, kept: dict[str, dict[str, Any]]) -> Image.Image:
    """The first held-out sample of a task, once for each method and layer, coloured where tokens were kept.

    Args:
      task: of the demo.
      budget: for the title.
      kept: for each method its line of kind "kept"; see `results`.

    Raises:
      InputError: a line is of another number of visual tokens than the sample has.
    """
    sample = make_sample(task, HELD_OUT_SEED, 0, max_questions=1)
    tokens = len(sample.images) * FULL_GRID**2
    for method, line in kept.items():
        if len(line["layers"][0]) != tokens:
            raise InputError(
                f"what {method} kept of {task} is noted for {len(line['layers'][0])} visual tokens, the sample has "
                f"{tokens}: remove that line of the results and the result after it, which is then measured again"
            )
    question, answer = sample.questions[0]
    images = np.concatenate(list(sample.images), axis=1)
    height = round(_TILE * images.shape[0] / images.shape[1]) if len(sample.images) > 1 else _TILE
    layers = len(next(iter(kept.values()))["layers"])
    left = _MARGIN + 92
    sheet = Sheet(left + len(kept) * (_TILE + _GAP) + _MARGIN - _GAP, 210 + (layers + 1) * (height + _GAP) + 20)
    sheet.text(_MARGIN, 50, f"What {len(kept)} methods keep at {100 * budget:g} %", 28)
    sheet.text(_MARGIN, 82, f"“{question}”  Right answer: {answer}", 19)
    sheet.text(_MARGIN, 108, "Coloured: kept by some (pale) or all (full colour) of the KV heads", 17, GREY)
    for column, (method, line) in enumerate(kept.items()):
        x = left + column * (_TILE + _GAP)
        shares = np.array([[int(digit) for digit in layer] for layer in line["layers"]], np.float32) / 9
        sheet.text(x, 152, _fit(Method(method).label, 18), 18)
        sheet.text(x, 178, _fit(f"answers: {line['answer'] or 'nothing'}", 16), 16, GREY)
        for row in range(layers + 1):
            y = 196 + row * (height + _GAP)
            if column == 0:
                sheet.text(_MARGIN, y + height / 2, "all layers" if row == 0 else f"layer {row - 1}", 16, GREY, "lm")
            share = shares.mean(axis=0) / max(float(shares.mean(axis=0).max()), 1e-6) if row == 0 else shares[row - 1]
            sheet.paste(_overlay(images, len(sample.images), share), x, y, _TILE, height)
    return sheet.picture()


def _overlay(images: np.ndarray, count: int, share: np.ndarray) -> Image.Image:
    """Images side by side, their patches pale where nothing was kept and tinted where something was."""
    side = round((len(share) // count) ** 0.5)
    grids = share.reshape(count, side, side)
    weight = np.concatenate(list(grids), axis=1)
    patch = images.shape[0] // side
    weight = np.repeat(np.repeat(weight, patch, axis=0), patch, axis=1)[..., None]
    grey = 255 - (255 - images.astype(np.float32).mean(axis=2, keepdims=True)) * 0.55
    tinted = _HOT + (255 - _HOT) * 0.12
    ink = images.astype(np.float32) / 255
    coloured = tinted * (0.35 + 0.65 * ink)
    return Image.fromarray((grey * (1 - 0.9 * weight) + coloured * 0.9 * weight).clip(0, 255).astype(np.uint8))


def _fit(text: str, size: int) -> str:
    while text_width(text, size) > _TILE:
        text = text[:-2].rstrip() + "…"
    return text


def choose(kept: dict[tuple[str, str, float], dict[str, Any]], task: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The lines of a task for the methods wanted, as far as there are any."""
    lines = {method: line for (name, method, _), line in kept.items() if name == task and "layers" in line}
    return {method: lines[method] for method in wanted if method in lines}
