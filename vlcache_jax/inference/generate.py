"""Generating answers: prefill, then a loop on the device; or the same step, streamed."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.decode_step import advance, check_room
from vlcache_jax.inference.finiteness import is_ready, require_finite, usable_rows
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inference.report import Report, make_report
from vlcache_jax.inference.sampling import Sampling, next_token
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import automatic, on_every_process, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.parallel.seeds import Seeds, seed_words
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.policy import Policy
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
    """

    tokens: jax.Array
    lengths: jax.Array
    report: Report


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    """What a step changes; the read-only stores stay outside."""

    step: jax.Array  # i32 [], tokens chosen so far
    token: jax.Array  # i32 [batch], the last one
    finished: jax.Array  # bool [batch]
    state: KVState  # without what is read-only


def generate(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None = None,
    max_new_tokens: int = 64,
    *,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    eos_token_ids: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> Generation:
    """Answers a batch of prompts with a compressed cache.

    Pure: works under `jax.jit`, `jax.pmap` and on a mesh. Called plainly it runs two compiled programs, prefill and
    decoding (a `lax.while_loop` that ends when every row has).

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters, a nested dict.
      batch: prompts, from `vlm.processor`.
      policy: what to keep of the prompt's cache; `FullCache()` by default.
      max_new_tokens: answers are cut at this length.
      sampling: None for greedy decoding.
      seeds: one for all rows or one for each: integers of up to 64 bits, or keys of `jax.random.key`. A row's sample
        depends on its own seed, never on the batch or on JAX's settings; to draw several answers to one prompt, see
        `vlc.answer`.
      eos_token_ids: ids that end a row; those of the checkpoint by default. An empty list never stops.
      kernels: which implementation of each op to use; the platform's best by default.

    Returns:
      The answers and a report.

    Raises:
      InputError: see `prefill`; or seeds that are none, or other than rows in number.
      NonFiniteError: scores or logits of a row are NaN or infinite. Raised when all has run; inside `jit` and over
        several processes `report.finite` alone tells.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, policy=vlc.VLCache(budget=0.1), max_new_tokens=64)
      texts = vlm.processor.decode(out)
    """
    policy = FullCache() if policy is None else policy
    seeds = seed_words(seeds, (batch.size,))
    logits, state = prefill(model, params, batch, policy, max_new_tokens, kernels=kernels)
    report = make_report(model.spec, policy, state, state.next_position, batch.length)
    tokens, lengths, finite = decode_all(
        model, params, logits, state, max_new_tokens, sampling, seeds, eos_token_ids, kernels
    )
    out = Generation(tokens, lengths, dataclasses.replace(report, finite=finite))
    density = state.allocation.density
    require_finite(finite, out, dtype=model.spec.dtype, before=state.finite, density=density, policy=policy)
    return out


def stream(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    policy: Policy | None = None,
    max_new_tokens: int = 64,
    *,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    eos_token_ids: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `generate` as they come.

    Arguments and errors as in `generate`; they are checked when the function is called, not at the first token.

    Yields:
      i32 [batch], one token per row and step; the pad id for rows that have ended. Stops when all rows have. A step
      in which logits are not finite is a `NonFiniteError` when it is read, with the step's tokens as its `result`.
    """
    policy = FullCache() if policy is None else policy
    seeds = seed_words(seeds, (batch.size,))
    logits, state = prefill(model, params, batch, policy, max_new_tokens, kernels=kernels)
    options = {"sampling": sampling, "seeds": seeds, "eos_token_ids": eos_token_ids, "kernels": kernels}
    return stream_decode(model, params, logits, state, max_new_tokens, **options)  # type: ignore[arg-type]


def decode(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    eos_token_ids: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The second half of `generate`: answers from what `prefill` returned.

    Args:
      model, params, sampling, seeds, eos_token_ids, kernels: as in `generate`.
      logits: of the first token, f32 [batch, vocab].
      state: as `prefill` returned it. It stays valid: several answers may be drawn from one. (A rule that rewrites the
        context works on a copy of it.)
      max_new_tokens: at most what the state was made for, unless the policy's rule lets answers grow longer.

    Returns:
      (tokens i32 [batch, max_new_tokens], lengths i32 [batch]), as in `Generation`.

    Raises:
      InputError: seeds that do not fit, max_new_tokens beyond the state's room or the model's positions, or rows with
        different numbers of generated tokens. What depends on the values of a state that is still being computed is
        checked when all has run.
      NonFiniteError: as in `generate`. Inside `jit` nothing tells: use `generate`, or `decode_step` and `state.finite`.
    """
    _check_count(state, max_new_tokens)
    if is_ready(state.next_position):
        _check_values(model, state, max_new_tokens)
    tokens, lengths, finite = decode_all(
        model, params, logits, state, max_new_tokens, sampling, seeds, eos_token_ids, kernels
    )
    _check_values(model, state, max_new_tokens)
    density = state.allocation.density
    require_finite(finite, (tokens, lengths), dtype=model.spec.dtype, before=state.finite, density=density)
    return tokens, lengths


def decode_all(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    max_new_tokens: int,
    sampling: Sampling | None,
    seeds: Any,
    eos_token_ids: Sequence[int] | None,
    kernels: Kernels | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`decode` without checks of the state: tokens, lengths, and bool [batch], whether all was finite."""
    words = placed(seed_words(seeds, (logits.shape[0],)), params)
    stop = _stop_ids(model, eos_token_ids)
    with on_mesh_of(params, logits, state):
        out = _decode(model, params, logits, state, words, max_new_tokens, sampling, stop, kernels or Kernels())
    return on_every_process(out)


def stream_decode(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seeds: Seeds = 0,
    eos_token_ids: Sequence[int] | None = None,
    kernels: Kernels | None = None,
) -> Iterator[np.ndarray]:
    """The second half of `stream`; arguments as in `decode`, errors as in `decode` and `stream`."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, logits, state))):
        raise InputError("a stream hands its tokens to Python, which a traced program cannot: use generate or decode")
    _check_count(state, max_new_tokens)
    if is_ready(state.next_position):
        _check_values(model, state, max_new_tokens)
    words = placed(seed_words(seeds, (logits.shape[0],)), params)
    stop = _stop_ids(model, eos_token_ids)

    def read(loop: _Loop) -> tuple[np.ndarray, bool]:
        token, finished, finite = on_every_process((loop.token, loop.finished, loop.state.finite))
        token, finished = jax.device_get((token, finished))
        density = state.allocation.density
        require_finite(finite, token, dtype=model.spec.dtype, before=state.finite, density=density)
        return token, bool(finished.all())

    def tokens() -> Iterator[np.ndarray]:
        stores = state.stores
        own = _with_stores(jax.tree.map(jnp.copy, _with_stores(state, ())), stores)
        loop = _start(logits, own, words, sampling, stop)
        _check_values(model, state, max_new_tokens)
        token, ended = read(loop)
        yield token
        for _ in range(max_new_tokens - 1):
            if ended:
                return
            with on_mesh_of(params, loop):
                loop = _stream_step(model, params, stores, loop, words, sampling, stop, kernels or Kernels())
            token, ended = read(loop)
            yield token

    return tokens()


def _check_count(state: KVState, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer: give at least 1")
    if not state.decoding.unlimited and max_new_tokens > state.tail.capacity:
        raise InputError(
            f"max_new_tokens={max_new_tokens} must lie between 1 and {state.tail.capacity}, the room of this "
            "state: prefill with a larger max_new_tokens, or with another Policy.generated"
        )


def _check_values(model: VisionLanguageModel, state: KVState, max_new_tokens: int) -> None:
    """What depends on the values of the state; waits for it."""
    check_room(state, max_new_tokens - 1)  # the last token is not appended
    if isinstance(state.next_position, jax.core.Tracer):
        return
    needed = int(jax.device_get(on_every_process(state.next_position)).max()) + max_new_tokens
    if needed > model.spec.max_positions:
        raise InputError(
            f"max_new_tokens={max_new_tokens} needs {needed} positions but the model has {model.spec.max_positions}: "
            "lower it"
        )


def _stop_ids(model: VisionLanguageModel, eos_token_ids: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(model.spec.eos_token_ids if eos_token_ids is None else (int(i) for i in eos_token_ids))


def _is_stop(token: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return jnp.any(token[:, None] == jnp.asarray(stop, jnp.int32)[None], axis=1)


@partial(jax.jit, static_argnames=("sampling", "stop"))
@automatic
def _start(
    logits: jax.Array, state: KVState, seeds: jax.Array, sampling: Sampling | None, stop: tuple[int, ...]
) -> _Loop:
    token = next_token(logits, sampling, seeds, 0)
    state = dataclasses.replace(state, finite=state.finite & usable_rows(logits))
    return _Loop(jnp.int32(1), token, _is_stop(token, stop), _with_stores(state, ()))


def _step(
    model: VisionLanguageModel,
    params: Params,
    stores: tuple[PackedStore, ...],
    loop: _Loop,
    seeds: jax.Array,
    sampling: Sampling | None,
    stop: tuple[int, ...],
    kernels: Kernels,
) -> _Loop:
    logits, state = advance(model, params, loop.token, _with_stores(loop.state, stores), kernels)
    state = dataclasses.replace(state, finite=jnp.where(loop.finished, loop.state.finite, state.finite))
    token = next_token(logits, sampling, seeds, loop.step)
    token = jnp.where(loop.finished, model.spec.pad_token_id, token)
    return _Loop(loop.step + 1, token, loop.finished | _is_stop(token, stop), _with_stores(state, ()))


_stream_step = jax.jit(
    automatic(_step), static_argnames=("model", "sampling", "stop", "kernels"), donate_argnames=("loop",)
)


def _with_stores(state: KVState, stores: tuple[PackedStore, ...]) -> KVState:
    if state.decoding.rewrites_context:
        return state
    context, more = (stores[0], stores[1:]) if stores else (None, ())  # None only while looping
    return dataclasses.replace(state, context=context, more=more)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "stop", "kernels"))
@automatic
def _decode(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    seeds: jax.Array,
    max_new_tokens: int,
    sampling: Sampling | None,
    stop: tuple[int, ...],
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def unfinished(carry: tuple[_Loop, jax.Array, jax.Array]) -> jax.Array:
        loop, _, _ = carry
        return (loop.step < max_new_tokens) & ~jnp.all(loop.finished)

    def body(carry: tuple[_Loop, jax.Array, jax.Array]) -> tuple[_Loop, jax.Array, jax.Array]:
        loop, tokens, lengths = carry
        lengths = jnp.where(loop.finished, lengths, lengths + 1)
        new = _step(model, params, state.stores, loop, seeds, sampling, stop, kernels)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new.token[:, None], loop.step, axis=1)
        return new, tokens, lengths

    params, logits, state = _without_derivative((params, logits, state))
    loop = _start(logits, state, seeds, sampling, stop)
    rows = loop.token.shape[0]
    tokens = jnp.full((rows, max_new_tokens), model.spec.pad_token_id, jnp.int32).at[:, 0].set(loop.token)
    carry = varying((loop, tokens, jnp.ones((rows,), jnp.int32)), params, logits, state, seeds)
    loop, tokens, lengths = jax.lax.while_loop(unfinished, body, carry)
    return tokens, lengths, loop.state.finite


@jax.custom_jvp
def _without_derivative(tree: Any) -> Any:
    return tree


@_without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise InputError(
        "generated tokens are whole numbers and have no derivative with respect to the parameters: take the "
        "log-probabilities of an answer from one pass over prompt and answer, model.apply({'params': params}, batch, "
        "method='forward') (docs/training.md), and call generate, decode or answer outside of what is differentiated, "
        "or with jax.lax.stop_gradient(params)"
    )
