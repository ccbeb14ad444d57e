"""Look-ahead: the last rows of a question also predict the tokens after the answer's first one.

A large model's prompt rows already gather what the answer will need, which is what post-vision scores rely on. A small
one trained on next tokens alone puts every look-up off to the row that writes the token, so that prompt rows attend to
little of it. Predicting several tokens ahead from one row (Gloeckle et al., arXiv 2404.19737) makes up for it. The
heads are thrown away after training.

    prompt                ... water ? ASSISTANT :
    heads 0, 1, 2, ...        3349  3349  3349  3349 </s>    from each of the last rows
    next token                                  water        the model's own head
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlcache_jax.training.batch import TrainBatch

QUESTION = 24  # columns before an answer that can be of its question


class Ahead(NamedTuple):
    """Where the questions of a packed batch end, and what their last rows shall predict.

    Attributes:
      rows: i32 [batch, questions, depth], the last rows before each answer, the very last first; 0 where there is no
        question.
      targets: i32 [batch, questions, tokens], what follows the answer's first token; -1 beyond its end.
    """

    rows: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray


def take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [batch, questions, n] of x [batch, length, ...]."""
    index = rows.reshape(rows.shape[0], -1, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1).reshape(*rows.shape, *x.shape[2:])


def ahead_targets(batch: TrainBatch, questions: int, depth: int, tokens: int) -> Ahead:
    """Finds the answers of a packed batch, and the last `depth` rows before each."""
    assert batch.segments is not None  # packed
    size = batch.segments.shape[0]
    rows = np.zeros((size, questions, depth), np.int32)
    targets = np.full((size, questions, tokens), -1, np.int32)
    for row in range(size):
        for number in range(int(np.max(batch.segments[row]))):
            answer = np.flatnonzero((batch.segments[row] == number + 1) & (batch.weights[row] > 0))
            rows[row, number] = answer[0] - np.arange(depth)
            later = batch.targets[row, answer[1 : tokens + 1]]
            targets[row, number, : len(later)] = later
    return Ahead(rows, targets)


def ahead_loss(heads: jax.Array, hidden: jax.Array, ahead: Ahead) -> tuple[jax.Array, jax.Array]:
    """(mean cross entropy, accuracy) of heads f32 [tokens, width, vocab] on hidden states [batch, length, width]."""
    rows = take(hidden, jnp.asarray(ahead.rows))
    logits = jnp.einsum("bqdw,twv->bqdtv", rows, heads.astype(rows.dtype), preferred_element_type=jnp.float32)
    targets = jnp.broadcast_to(jnp.asarray(ahead.targets)[:, :, None], logits.shape[:-1])
    wanted, targets = targets >= 0, jnp.maximum(targets, 0)
    count = jnp.maximum(jnp.sum(wanted), 1).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, -1) == targets) & wanted
    return jnp.sum(losses * wanted.astype(jnp.float32)) / count, jnp.sum(hits).astype(jnp.float32) / count
