"""A picture of what several methods kept of one sample, layer by layer."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from PIL import Image

from vlcache_jax.demo.data.samples import FULL_GRID, HELD_OUT_SEED, make_sample
from vlcache_jax.demo.study.methods import Method
from vlcache_jax.demo.study.plots import LOOK, figure, picture
from vlcache_jax.errors import InputError

_HOT = np.array((222, 91, 36), np.float32)


@rc_context(LOOK)
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
    rows = 1 + len(next(iter(kept.values()))["layers"])
    drawn = figure(
        1.2 + 2.3 * len(kept),
        1.8 + 2.3 * rows * images.shape[0] / images.shape[1],
        f"What {len(kept)} methods keep at {100 * budget:g} %",
        f"“{question}”  Right answer: {answer}. Coloured: kept by some (pale) or all of the KV heads",
    )
    for column, (method, line) in zip(drawn.subplots(rows, len(kept), squeeze=False).T, kept.items()):
        shares = np.array([[int(digit) for digit in layer] for layer in line["layers"]], np.float32) / 9
        mean = shares.mean(axis=0)
        for number, (axes, share) in enumerate(zip(column, [mean / max(float(mean.max()), 1e-6), *shares])):
            axes.imshow(_overlay(images, len(sample.images), share))
            axes.set(xticks=[], yticks=[])
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel(f"layer {number - 1}" if number else "all layers")
        answers = textwrap.shorten(f"answers: {line['answer'] or 'nothing'}", 28, placeholder=" …")
        column[0].set_title(f"{textwrap.shorten(Method(method).label, 22, placeholder=' …')}\n{answers}", fontsize=11)
    return picture(drawn)


def _overlay(images: np.ndarray, count: int, share: np.ndarray) -> np.ndarray:
    """Images side by side, their patches pale where nothing was kept and tinted where something was."""
    side = round((len(share) // count) ** 0.5)
    weight = np.concatenate(list(share.reshape(count, side, side)), axis=1)
    weight = np.kron(weight, np.ones((images.shape[0] // side,) * 2, np.float32))[..., None]
    grey = 255 - (255 - images.astype(np.float32).mean(axis=2, keepdims=True)) * 0.55
    tinted = _HOT + (255 - _HOT) * 0.12
    coloured = tinted * (0.35 + 0.65 * images.astype(np.float32) / 255)
    return (grey * (1 - 0.9 * weight) + coloured * 0.9 * weight).clip(0, 255).astype(np.uint8)


def choose(kept: dict[tuple[str, str, float], dict[str, Any]], task: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The lines of a task for the methods wanted, as far as there are any."""
    lines = {method: line for (name, method, _), line in kept.items() if name == task and "layers" in line}
    return {method: lines[method] for method in wanted if method in lines}
