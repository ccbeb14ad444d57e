"""First stage of the demo's recipe: tower and projector alone learn what every patch shows.

A throw-away linear head on the projected features predicts `PatchLabels`, and in which coarse cell of the full image
the patch lies. The decoder then starts from features that
hold the words and digits, instead of having to discover reading through a few answer tokens.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlcache_jax.demo.data.labels import CELL, CLASSES, DIGIT_SLOTS, PatchLabels
from vlcache_jax.demo.data.samples import FULL_GRID, IMAGE_MEAN, IMAGE_STD, make_sample
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.training.state import Loss, Metrics, Params

_WIDTHS = {name: classes * (DIGIT_SLOTS if name == "digits" else 1) for name, classes in CLASSES.items()}
_CELLS = FULL_GRID // CELL  # along a side


_SIZE = 0.3
"""Root mean square of projected features, about that of the token embeddings."""


class PatchBatch(NamedTuple):
    """Sub-images with the labels of their patches.

    Attributes:
      pixels: u8 [batch, 32 * grid, 32 * grid, 3].
      labels: i32 arrays [batch, grid², ...].
      patch_ids: i32 [grid²], where in the full image the sub-images lie.
    """

    pixels: jax.Array | np.ndarray
    labels: dict[str, jax.Array | np.ndarray]
    patch_ids: jax.Array | np.ndarray


def normalise(pixels: jax.Array) -> jax.Array:
    """u8 pixels -> f32, as the demo's preprocessor_config says."""
    return (pixels.astype(jnp.float32) / 255 - IMAGE_MEAN) / IMAGE_STD


def window(rng: np.random.Generator, grid: int) -> np.ndarray:
    """Patch ids i32 [grid²] of a random window of the full image's patch grid."""
    y, x = rng.integers(0, FULL_GRID - grid + 1, 2)
    rows = np.arange(y, y + grid)[:, None] * FULL_GRID
    return (rows + np.arange(x, x + grid)).reshape(-1).astype(np.int32)


_REUSE = 3
"""Batches made of the same images, each at another place in the full image: drawing costs more than a step."""


def patch_batches(seed: int, grid: int, size: int) -> Iterator[PatchBatch]:
    """Endless batches, half of them fields and half scenes and price lists."""
    tasks = ("documents", "prices", "documents", "scenes")
    for number in itertools.count():
        rng = np.random.default_rng([seed, 1, number])
        samples = [
            make_sample(tasks[i % len(tasks)], seed, number * size + i, grid, max_questions=1) for i in range(size)
        ]
        labels = PatchLabels.stack([sample.labels for sample in samples])
        pixels = np.concatenate([sample.images for sample in samples])
        targets = {name: getattr(labels, name)[:, 0].astype(np.int32) for name in CLASSES}
        for _ in range(_REUSE):
            yield PatchBatch(pixels, targets, window(rng, grid))


def init_head(key: jax.Array, hidden_size: int) -> Params:
    """The linear head's parameters."""
    width = sum(_WIDTHS.values()) + _CELLS**2
    return {"kernel": 0.02 * jax.random.normal(key, (hidden_size, width)), "bias": jnp.zeros(width)}


def patch_loss(model: Llava) -> Loss:
    """Cross entropy of the patch labels; parameters {"vision", "projector": the model's, "head": `init_head`}.

    The head reads the projected features as the decoder will: normalised. Their size is held near `_SIZE`, so that
    the residual stream neither drowns in them nor they in it.

    Without being asked for it, the tower forgets where a patch lies: nothing else it predicts depends on that.

    Metrics: the share of labelled patches whose class is right, per kind of label ("digits": all four of a value),
    and of unlabelled ones that are given a class ("..._false"); "place": of all patches whose cell is right.
    """

    def loss(params: Params, batch: PatchBatch) -> tuple[jax.Array, Metrics]:
        body = {name: params[name] for name in ("vision", "projector")}
        features: Any = model.apply({"params": body}, normalise(batch.pixels), batch.patch_ids, method="encode_images")
        size = jnp.mean(features**2, -1, keepdims=True) + 1e-6
        features = features * jax.lax.rsqrt(size)
        logits = features @ params["head"]["kernel"] + params["head"]["bias"][None, None]
        oversize = jnp.mean(jnp.log(size / _SIZE**2) ** 2)
        total, metrics = jnp.zeros(()), {}
        ends = np.cumsum(list(_WIDTHS.values()))
        for (name, classes), end in zip(CLASSES.items(), ends, strict=True):
            part = logits[..., end - _WIDTHS[name] : end]
            wanted = batch.labels[name]
            if name == "digits":
                part = part.reshape(*part.shape[:-1], DIGIT_SLOTS, classes)
            losses = optax.softmax_cross_entropy_with_integer_labels(part, wanted)
            # Most patches show nothing: the few that do count as much as all of those together.
            shown = (wanted > 0).astype(jnp.float32)
            total += jnp.sum(losses * (0.2 + 4 * shown)) / shown.size
            right = jnp.argmax(part, -1) == wanted
            if name == "digits":
                right, shown = right.all(-1), shown.max(-1)
            right = right.astype(jnp.float32)
            metrics[name] = jnp.sum(right * shown) / jnp.maximum(shown.sum(), 1)
            metrics[name + "_false"] = jnp.sum((1 - right) * (1 - shown)) / jnp.maximum((1 - shown).sum(), 1)
        rows, columns = jnp.divmod(jnp.asarray(batch.patch_ids), FULL_GRID)
        place = jnp.broadcast_to(rows // CELL * _CELLS + columns // CELL, logits.shape[:-1])
        part = logits[..., -(_CELLS**2) :]
        total += 0.2 * jnp.mean(optax.softmax_cross_entropy_with_integer_labels(part, place))
        metrics["place"] = jnp.mean(jnp.argmax(part, -1) == place)
        return total + 0.02 * oversize, metrics

    return loss
