"""Cross entropy of the answers, and how many of them are right."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlcache_jax.errors import InputError
from vlcache_jax.parallel.mesh import automatic, by_row, on_mesh_of
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.state import Loss, Metrics, Params


def answer_loss(model: nn.Module) -> Loss:
    """The loss of `make_train_step`: mean cross entropy of the answer tokens, weighted by `TrainBatch.weights`.

    Raises InputError for a model whose weights do not lie as training needs them: `vlm.with_layout("stacked")` has one.

    Its metrics: "token_accuracy", "exact_match" (the share of answers whose every token is the most likely one, which
    is greedy decoding's exact match) and "weight" (the sum of the weights).
    """
    if getattr(model, "layout", "stacked") != "stacked":
        raise InputError(
            f"the model's weights lie for inference (layout={model.layout!r}): train with the model and the parameters "
            "of vlm.with_layout('stacked'), or load with layout='stacked' or another param_dtype"
        )

    def loss(params: Params, batch: TrainBatch) -> tuple[jax.Array, Metrics]:
        logits: Any = model.apply({"params": params}, batch.batch, batch.positions, batch.segments, method="forward")
        return weighted_cross_entropy(logits, batch)

    return loss


def weighted_cross_entropy(logits: jax.Array, batch: TrainBatch) -> tuple[jax.Array, Metrics]:
    """See `answer_loss`; logits f32 [batch, length, vocab]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    weight = jnp.sum(batch.weights)
    right, asked = answers_right(logits, batch)
    wanted = batch.weights > 0
    hits = (jnp.argmax(logits, -1) == batch.targets) & wanted
    return jnp.sum(losses * batch.weights) / jnp.maximum(weight, 1e-9), {
        "token_accuracy": jnp.sum(hits) / jnp.maximum(jnp.sum(wanted), 1),
        "exact_match": jnp.sum(right) / jnp.maximum(jnp.sum(asked), 1),
        "weight": weight,
    }


def answers_right(logits: jax.Array, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """Which answers are right under teacher forcing, and which there are.

    Returns:
      (right, asked): bool [batch, length]; column s is the question of segment s.
    """

    def some(marks: jax.Array, segments: jax.Array) -> jax.Array:
        rows = jax.lax.iota(jnp.int32, segments.shape[0])[:, None]
        return jnp.zeros(segments.shape, jnp.int32).at[rows, segments].add(marks.astype(jnp.int32)) > 0

    wanted = batch.weights > 0
    segments = jnp.ones(wanted.shape, jnp.int32) if batch.segments is None else batch.segments
    of_segments = by_row(some, segments.shape[0])
    wrong = of_segments(wanted & (jnp.argmax(logits, -1) != batch.targets), segments)
    asked = of_segments(wanted, segments)
    return asked & ~wrong, asked


def make_eval_step(model: nn.Module) -> Callable[[Params, TrainBatch], tuple[jax.Array, jax.Array]]:
    """A jitted `(params, batch) -> (right, asked)`; see `answers_right`."""

    def evaluate(params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply({"params": params}, batch.batch, batch.positions, batch.segments, method="forward")
        return answers_right(logits, batch)

    compiled = jax.jit(automatic(evaluate))

    def run(params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        with on_mesh_of(params, batch):
            return compiled(params, batch)

    return run
