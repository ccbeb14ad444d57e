"""Answers: to prompts, and to questions about a context; at once, or token by token."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.context import Context, by_entry, check_count, check_positions, started
from vlcache_jax.inference.decode import decode_all, stream_decode
from vlcache_jax.inference.extend import extended
from vlcache_jax.inference.finiteness import require_finite
from vlcache_jax.inference.prefill import run_prompts
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inference.report import Report
from vlcache_jax.inference.row_options import RowOptions, Samplings, StopIds, row_options
from vlcache_jax.inputs import Batch, Continuation
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.seeds import Seeds, seed_words
from vlcache_jax.patterns.pattern import Pattern
from vlcache_jax.policies.policy import Policy
from vlcache_jax.pruning.method import Pruning
from vlcache_jax.typing import Params, VisionLanguageModel


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """Answers of a batch.

    Attributes:
      tokens: i32 [batch, max_new_tokens], filled with the pad id after a row's end.
      lengths: i32 [batch]. Tokens of each answer, the end-of-sequence token included.
      report: what was kept, and what it cost.
      log_probabilities: f32 [batch, max_new_tokens], natural logarithm of the probability of each token under the model
        that sees what was kept, before any temperature or filter, as `vlc.score` has them; 0 behind a row's end. None
        unless they were asked for.
      sampling_log_probabilities: the same of the distribution that the token was drawn from, after temperature, top-k
        and top-p: what importance weights divide by. 0 for greedy rows, which draw nothing else.
    """

    tokens: jax.Array
    lengths: jax.Array
    report: Report
    log_probabilities: jax.Array | None = None
    sampling_log_probabilities: jax.Array | None = None


def generate(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | Recipe | None = None,
    max_new_tokens: int = 64,
    *,
    prefill: Pattern | None = None,
    pruning: Pruning | None = None,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    log_probabilities: bool = False,
    kernels: Kernels | None = None,
) -> Generation:
    """Answers a batch of prompts with a compressed cache.

    Pure: works under `jax.jit`, `jax.pmap` and on a mesh. Called plainly it runs two large programs, prefill
    and decoding (a `lax.while_loop` that ends when every row has). It is `answer` of what `prefill` returns.

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters, a nested dict.
      batch: prompts, from `vlm.processor`.
      policy: what to keep of the prompt's cache, `FullCache()` by default; or a `vlc.Recipe`, which says `prefill` and
        `pruning`, too.
      max_new_tokens: answers are cut at this length.
      prefill: which keys the prompt's queries look at, `vlc.XAttention()` say; all by default.
      pruning: which visual tokens go on from layer to layer of the prefill, `vlc.PyramidDrop()` say; all by default.
      sampling: None for greedy decoding; one for all rows, or a sequence of one for each, None among them. Another
        compiles nothing.
      seeds: one for all rows or one for each: integers of up to 64 bits, or keys of `jax.random.key`. A row's sample
        depends on its own seed, never on the batch or on JAX's settings; to draw several answers to one prompt, see
        `vlc.answer`.
      eos_token_ids: ids that end a row, or a list of them for each row; those of the checkpoint by default. An empty
        list never stops.
      log_probabilities: return those of the tokens, too, which compiles nothing else.
      kernels: which implementation of each op to use; the platform's best by default.

    Returns:
      The answers and a report.

    Raises:
      InputError: see `prefill`; or seeds, sampling or stop ids that are none, or other than rows in number.
      NonFiniteError: scores or logits of a row are NaN or infinite. Raised when all has run; inside `jit` and over
        several processes `report.finite` alone tells.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, policy=vlc.VLCache(budget=0.1), max_new_tokens=64)
      texts = vlm.processor.decode(out)
    """
    options = row_options(
        model.spec, batch.size, max_new_tokens, sampling, seeds, eos_token_ids, log_probabilities=log_probabilities
    )
    recipe = recipe_of(policy, prefill, pruning)
    ctx = run_prompts(model, params, batch, recipe, max_new_tokens, kernels)
    return _answers(ctx, (batch.size,), max_new_tokens, options, log_probabilities, kernels, recipe.policy)


def stream(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | Recipe | None = None,
    max_new_tokens: int = 64,
    *,
    prefill: Pattern | None = None,
    pruning: Pruning | None = None,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    kernels: Kernels | None = None,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `generate` as they come.

    Arguments and errors as in `generate`; they are checked when the function is called, not at the first token.

    Yields:
      i32 [batch], one token per row and step; the pad id for rows that have ended. Stops when all rows have. A step
      in which logits are not finite is a `NonFiniteError` when it is read, with the step's tokens as its `result`.
    """
    row_options(model.spec, batch.size, max_new_tokens, sampling, seeds, eos_token_ids)  # before anything is compiled
    recipe = recipe_of(policy, prefill, pruning)
    logits, state = run_prompts(model, params, batch, recipe, max_new_tokens, kernels).start(max_new_tokens)
    options = {"sampling": sampling, "seeds": seeds, "eos_token_ids": eos_token_ids, "kernels": kernels}
    return stream_decode(model, params, logits, state, max_new_tokens, **options)  # type: ignore[arg-type]


def answer(
    ctx: Context,
    questions: Continuation | None = None,
    max_new_tokens: int = 64,
    *,
    samples: int | None = None,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    log_probabilities: bool = False,
    kernels: Kernels | None = None,
) -> Generation:
    """Answers questions to a context, all at once; the context is neither copied nor repeated. Pure, like `generate`.

    Args:
      ctx: from `compress`, `extend` or `load_context`.
      questions: from `vlm.processor.continuation`: one or several for each row of the context. None: the prompt itself
        ends in the question.
      max_new_tokens: answers are cut at this length.
      samples: answers to each question; None for one, without an axis of its own.
      sampling: None for greedy decoding.
      seeds: one, or an array of the answers' leading axes, or broadcast to them; integers or keys, as in `generate`.
        With a single one sample i draws with seed + i. A draw depends on its own seed, never on the others.
      eos_token_ids: ids that end an answer; those of the checkpoint by default. An empty list never stops.
      log_probabilities: as in `generate`.
      kernels: as in `compress`.

    Returns:
      tokens i32 [..., max_new_tokens] and lengths i32 [...]; the leading axes are those of the questions, [rows]
      without questions, and one more, of the samples, with samples. The report is the context's, with the bytes of
      the answers' tail.

    Raises:
      InputError: see `extend`; max_new_tokens below 1, more positions than the model has, seeds that do not fit, or
        samples below 1, or above 1 without sampling.
      NonFiniteError: logits that are not finite; see `generate`.

    Example:
      questions = vlm.processor.continuation([["What is it?", "What colour is it?"]])
      out = vlc.answer(ctx, questions, max_new_tokens=32)
      [[first, second]] = vlm.processor.decode(out)
    """
    check_count("max_new_tokens", max_new_tokens)
    if samples is not None:
        check_count("samples", samples)
        if samples > 1 and sampling is None:
            raise InputError(f"samples={samples} greedy answers would all be the same: give sampling=Sampling(...)")
    lead = (ctx.rows,) if questions is None else np.shape(getattr(questions, "lengths", ()))
    shape = lead if samples is None else (*lead, samples)
    seeds = seed_words(seeds, shape, samples, f"answers {shape}").reshape(-1, 2)
    options = row_options(
        ctx.model.spec, len(seeds), max_new_tokens, sampling, seeds, eos_token_ids, log_probabilities=log_probabilities
    )
    if questions is None:
        check_positions(ctx, np.zeros(ctx.rows, np.int32), max_new_tokens)
    asked = ctx if questions is None else extended(ctx, (questions,), kernels, max_new_tokens)
    return _answers(asked, shape, max_new_tokens, options, log_probabilities, kernels)


def _answers(
    ctx: Context,
    shape: tuple[int, ...],
    max_new_tokens: int,
    options: RowOptions,
    log_probabilities: bool,
    kernels: Kernels | None,
    policy: Policy | None = None,
) -> Generation:
    """One answer for each of `shape`; `policy`, where it is known, is for the message of an error."""
    logits, state = started(ctx, max_new_tokens, len(options.temperature))
    tokens, lengths, finite, logs = decode_all(ctx.model, ctx.params, logits, state, max_new_tokens, options, kernels)
    found = (tokens, lengths, finite, state.finite, *(logs if log_probabilities else ()))
    tokens, lengths, finite, before, *logs = by_entry(found, shape)
    report = ctx.report.of_answers(state, finite)
    out, density = Generation(tokens, lengths, report, *logs), report.density
    require_finite(report.finite, out, dtype=ctx.model.spec.dtype, before=before, density=density, policy=policy)
    return out
