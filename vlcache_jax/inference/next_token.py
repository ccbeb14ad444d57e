"""The next token of each row, greedy or drawn; what is asked of a row is data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import as_unsigned, highest
from vlcache_jax.inference.row_options import RowOptions
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.seeds import random_bits, uniform


def filtered_logits(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits f32 [rows, vocab] after temperature, top-k and top-p: -inf where a token may not be drawn.

    No vocabulary is sorted: the k-th largest logit and the last of the smallest set are searched for bit by bit.

    Args:
      logits: f32 [rows, vocab].
      temperature: f32 [rows], above 0.
      top_k: i32 [rows], at least 1; the vocabulary's size or more keeps all.
      top_p: f32 [rows], above 0; 1 keeps all.
    """
    logits = logits / temperature[:, None]

    def most(logits: jax.Array) -> jax.Array:
        numbers = as_unsigned(logits)

        def enough(t: jax.Array) -> jax.Array:
            return jnp.sum(numbers >= t, axis=-1, keepdims=True, dtype=jnp.int32) >= top_k[:, None]

        kth = highest(enough, (len(logits), 1))
        return jnp.where(numbers >= kth, logits, -jnp.inf)

    def likeliest(logits: jax.Array) -> jax.Array:
        numbers, probability = as_unsigned(logits), jax.nn.softmax(logits, axis=-1)

        def reached(t: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(numbers >= t, probability, 0), axis=-1, keepdims=True) >= top_p[:, None]

        last = highest(reached, (len(logits), 1))
        return jnp.where((numbers >= last) | (top_p[:, None] >= 1), logits, -jnp.inf)

    logits = _where_any(top_k < logits.shape[-1], most, logits)
    return _where_any(top_p < 1, likeliest, logits)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32 [...] of tokens i32 [...] under logits f32 [..., vocab]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.scipy.special.logsumexp(logits, axis=-1)


def likeliest(logits: jax.Array, options: RowOptions, count: int | None) -> tuple[jax.Array, jax.Array] | None:
    """The likeliest tokens of each row, i32 [rows, count], with their log-probabilities under the model, f32.

    In falling order, the lowest id first on a tie; zeros if no row asks for log-probabilities; None without a count.
    """
    if count is None:
        return None
    nothing = jnp.zeros((len(logits), count), jnp.int32), jnp.zeros((len(logits), count), jnp.float32)

    def found(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        highest, tokens = jax.lax.top_k(logits, count)
        return tokens.astype(jnp.int32), highest - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)

    asked, nothing = jnp.asarray(options.log_probabilities), varying(nothing, logits, options)
    return jax.lax.cond(jnp.any(asked), found, lambda _: nothing, logits)


def next_token(logits: jax.Array, options: RowOptions, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Greedy or sampled token of each row, and how likely it was.

    What no row asks for costs nothing: an all-greedy batch is one argmax.

    Args:
      logits: f32 [rows, vocab].
      options: of the rows. A greedy row takes the lowest id on a tie. A row's draw depends on its own seed and step
        only, never on the batch.
      step: i32 [rows], index of the token in the answer.

    Returns:
      (tokens i32 [rows]; their log-probabilities under the model, and those with which they were drawn, f32 [rows]
      each, 0 for rows that do not ask for them).
    """
    seeds, temperature = jnp.asarray(options.seeds), jnp.asarray(options.temperature)
    top_k, top_p = jnp.asarray(options.top_k), jnp.asarray(options.top_p)
    samples, asked = temperature > 0, jnp.asarray(options.log_probabilities)
    zero = varying(jnp.zeros(logits.shape[:1], jnp.float32), logits, step, options)

    def draw(words: jax.Array, step: jax.Array, row: jax.Array) -> jax.Array:  # as jax.random.categorical by default
        number = jnp.maximum(uniform(random_bits(words, (step,), row.shape[0])), jnp.finfo(jnp.float32).tiny)
        return jnp.argmax(row - jnp.log(-jnp.log(number))).astype(jnp.int32)

    def drawn(greedy: jax.Array) -> tuple[jax.Array, jax.Array]:
        filtered = filtered_logits(logits, jnp.where(samples, temperature, 1), top_k, top_p)
        token = jnp.where(samples, jax.vmap(draw)(seeds, step, filtered), greedy)
        of_draw = _where_any(asked & samples, lambda _: log_probability(filtered, token), zero)
        return token, jnp.where(asked & samples, of_draw, 0)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token, of_draw = jax.lax.cond(jnp.any(samples), drawn, lambda greedy: (greedy, zero), greedy)
    of_model = _where_any(asked, lambda _: log_probability(logits, token), zero)
    return token, jnp.where(asked, of_model, 0), of_draw


def _where_any(rows: jax.Array, function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)`, or `x` where it is for no row."""
    return jax.lax.cond(jnp.any(rows), function, lambda x: x, x)
