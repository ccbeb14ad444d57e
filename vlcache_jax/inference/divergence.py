"""How far what one context kept moves the next token's distribution away from another's, along given answers."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError
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

_LOGITS = 2**27  # bytes of one context's logits that exist at once


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Divergence:
    """Two distributions of each token of given answers, compared. A pytree.

    Attributes:
      kl: f32 [..., length], Kullback-Leibler divergence KL(reference || kept) over the vocabulary, in nats; 0 behind
        an answer's end.
      same: bool [..., length], whether both find the same token likeliest; True behind an answer's end.
      log_probabilities: f32 [..., length], of the answers' tokens under the kept context, as in `Scores`; 0 behind an
        answer's end.
      lengths: i32 [...], tokens of each answer.
    """

    kl: jax.Array
    same: jax.Array
    log_probabilities: jax.Array
    lengths: jax.Array

    @property
    def mean(self) -> jax.Array:
        """f32 [...], nats a token."""
        return jnp.sum(self.kl, axis=-1) / self.lengths.astype(jnp.float32)

    @property
    def agreement(self) -> jax.Array:
        """f32 [...], share of an answer's tokens in whose place both find the same one likeliest."""
        different = jnp.sum(~self.same, axis=-1, dtype=jnp.float32)
        return 1 - different / self.lengths.astype(jnp.float32)


def divergence(reference: Context, kept: Context, answers: Any, *, kernels: Kernels | None = None) -> Divergence:
    """What compression changes, without any right answer: two contexts of the same prompts along given answers. Pure.

    Both are asked for the distribution of every token behind those before it, all tokens of all answers at once.
    Usually the reference has the full cache and the answers are its own.

    Args:
      reference, kept: contexts of as many rows, from `compress` or `extend`. Their models may differ, such as in the
        precision of the weights, but not in their vocabulary.
      answers: as in `score`.
      kernels: as in `compress`.

    Returns:
      The divergence, of the shape of the answers.

    Raises:
      PolicyError, InputError, NonFiniteError: as `score`; an InputError also of contexts that do not belong together.

    Example:
      full, kept = (vlc.compress(vlm.model, vlm.params, batch, x) for x in (vlc.FullCache(), vlc.VLCache(0.1)))
      vlc.divergence(full, kept, vlc.answer(full, max_new_tokens=64)).mean  # f32 [rows]
    """
    both = (reference, kept)
    if reference.logits.shape != kept.logits.shape:
        shapes = " and ".join(f"{ctx.rows} rows, {ctx.logits.shape[-1]} tokens" for ctx in both)
        raise InputError(f"the contexts are of {shapes}: give two of the same prompts and vocabulary")
    (tokens, lengths), _ = (appended(ctx, [answers]) for ctx in both)
    with on_mesh_of(kept.params, kept.stores, tokens):
        *measured, finite = _compared(
            tuple(ctx.model for ctx in both),
            tuple(ctx.params for ctx in both),
            tuple(ctx.stores for ctx in both),
            tuple((ctx.next_position, ctx.next_index) for ctx in both),
            tuple((ctx.logits, ctx.report.finite) for ctx in both),
            tokens,
            lengths,
            kernels or Kernels(),
        )
    shape = np.shape(answers.lengths)
    kl, same, logs, lengths, finite = by_entry((*measured, lengths, finite), shape)
    found = Divergence(kl, same, logs, lengths)
    require_finite(finite, found, dtype=kept.model.spec.dtype, density=kept.report.density)
    return found


@partial(jax.jit, static_argnames=("models", "kernels"))
@automatic
def _compared(
    models: tuple[Any, ...],
    params: tuple[Any, ...],
    stores: tuple[Any, ...],
    following: tuple[tuple[jax.Array, jax.Array], ...],
    before: tuple[tuple[jax.Array, jax.Array], ...],
    tokens: jax.Array,
    lengths: jax.Array,
    kernels: Kernels,
) -> tuple[jax.Array, ...]:
    """(What a `Divergence` has, each [rows, length], whether all is finite bool [rows])."""
    rows, length = tokens.shape
    first = [branches(logits, rows)[:, None] for logits, _ in before]
    found = _of_logits(first, tokens[:, :1])
    if length > 1:
        hidden = tuple(
            run_block(model, own, of_prompt, *where, tokens, lengths, kernels)[0][:, :-1]
            for model, own, of_prompt, where in zip(models, params, stores, following, strict=True)
        )

        def of_tokens(part: tuple[jax.Array, ...], _: Any) -> tuple[jax.Array, ...]:
            *hidden, said = part
            both = [unembed(model, own, x) for model, own, x in zip(models, params, hidden, strict=True)]
            return _of_logits(both, said)

        at_once = max(1, _LOGITS // (4 * rows * first[0].shape[-1]))
        rest = in_chunks(of_tokens, (*hidden, tokens[:, 1:]), at_once)
        found = tuple(jnp.concatenate(pair, axis=1) for pair in zip(found, rest, strict=True))
    kl, same, logs = found
    counts = jax.lax.iota(jnp.int32, length)[None] < lengths[:, None]
    finite = jnp.all(jnp.isfinite(kl) | ~counts, axis=1)
    for _, own_rows in before:
        finite &= branches(own_rows, rows)
    return jnp.where(counts, kl, 0), same | ~counts, jnp.where(counts, logs, 0), finite


def _of_logits(both: Sequence[jax.Array], tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Of logits f32 [..., vocab] each, the reference's first, and tokens i32 [...].

    Rounding does not make the divergence negative.
    """
    reference, kept = both
    logs, others = (jax.nn.log_softmax(x, axis=-1) for x in (reference, kept))
    kl = jnp.maximum(jnp.sum(jnp.exp(logs) * (logs - others), axis=-1), 0)
    return kl, jnp.argmax(reference, axis=-1) == jnp.argmax(kept, axis=-1), log_probability(kept, tokens)
