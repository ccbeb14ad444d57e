"""How likely given answers are under what a context kept of its prompts."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.append_block import run_block
from vlcache_jax.inference.context import Context, branches, by_entry
from vlcache_jax.inference.extend import appended
from vlcache_jax.inference.finiteness import require_finite
from vlcache_jax.inference.forward import unembed
from vlcache_jax.inference.next_token import log_probability
from vlcache_jax.kernels.chunks import in_chunks
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.parallel.ops import Kernels

_LOGITS = 2**28  # bytes of logits that exist at once


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of given answers. A pytree.

    Attributes:
      log_probabilities: f32 [..., length], natural logarithm of the probability of each token behind those before it;
        0 behind an answer's end.
      greedy: bool [..., length], whether greedy decoding takes the token there; True behind an answer's end.
      lengths: i32 [...], tokens of each answer.
    """

    log_probabilities: jax.Array
    greedy: jax.Array
    lengths: jax.Array

    @property
    def total(self) -> jax.Array:
        """f32 [...], log-probability of the whole answer."""
        return jnp.sum(self.log_probabilities, axis=-1)

    @property
    def mean(self) -> jax.Array:
        """f32 [...], of its tokens: what multiple choice compares where answers differ in length."""
        return self.total / self.lengths.astype(jnp.float32)


def score(ctx: Context, answers: Any, *, kernels: Kernels | None = None) -> Scores:
    """Log-probabilities of answers that are given, all tokens of all answers at once. Pure.

    The model's own, before any temperature or filter of `Sampling`. The answers see what the context kept of the
    prompt, and themselves, as the tokens of `answer` do. Compare several answers to one prompt for multiple choice;
    score what was sampled under `FullCache()` too for the weights exp(full - kept) that correct for a compressed cache.

    Args:
      ctx: from `compress` or `extend`.
      answers: `Continuation` or `Generation`, anything with `tokens` i32 [..., length] and `lengths` i32 [...];
        flattened, equally many consecutive entries for each row of the context. Tokens behind an answer's length do not
        count; to count the id that ends an answer let its length include it.
      kernels: as in `compress`.

    Returns:
      Scores of the shape of the answers.

    Raises:
      PolicyError: the context's rule for generated tokens rewrites what was kept, so that all at once is not one by
        one; see `extend`.
      InputError: see `extend`.
      NonFiniteError: logits that are not finite; see `generate`.

    Example:
      choices = vlm.processor.continuation([[" yes", " no"]])
      vlc.score(vlc.compress(vlm.model, vlm.params, batch, vlc.VLCache(0.1)), choices).total  # f32 [1, 2]
    """
    tokens, lengths = appended(ctx, [answers])
    with on_mesh_of(ctx.params, ctx.stores, tokens):
        found, greedy, finite = _score(
            ctx.model,
            ctx.params,
            ctx.stores,
            (ctx.next_position, ctx.next_index),
            (ctx.logits, ctx.report.finite),
            tokens,
            lengths,
            kernels or Kernels(),
        )
    shape = np.shape(answers.lengths)
    found, greedy, lengths, finite = by_entry((found, greedy, lengths, finite), shape)
    scores = Scores(found, greedy, lengths)
    require_finite(finite, scores, dtype=ctx.model.spec.dtype, density=ctx.report.density)
    return scores


@partial(jax.jit, static_argnames=("model", "kernels"))
@automatic
def _score(
    model: Any,
    params: Any,
    stores: Any,
    following: tuple[jax.Array, jax.Array],
    before: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    lengths: jax.Array,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probabilities f32 [rows, length], greedy bool [rows, length], whether all is finite bool [rows])."""
    rows, length = tokens.shape
    logits, finite = (branches(x, rows) for x in before)
    found, greedy = _of_tokens(logits[:, None], tokens[:, :1])
    if length > 1:
        hidden, *_ = run_block(model, params, stores, *following, tokens, lengths, kernels)

        def of_tokens(part: tuple[jax.Array, jax.Array], _: Any) -> tuple[jax.Array, jax.Array]:
            return _of_tokens(unembed(model, params, part[0]), part[1])

        at_once = max(1, _LOGITS // (4 * rows * logits.shape[-1]))
        rest = in_chunks(of_tokens, (hidden[:, :-1], tokens[:, 1:]), at_once)
        found, greedy = (jnp.concatenate(pair, axis=1) for pair in zip((found, greedy), rest))
    counts = jax.lax.iota(jnp.int32, length)[None] < lengths[:, None]
    finite &= jnp.all(jnp.isfinite(found) | ~counts, axis=1)
    return jnp.where(counts, found, 0), greedy | ~counts, finite


def _of_tokens(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return log_probability(logits, tokens), jnp.argmax(logits, axis=-1) == tokens
