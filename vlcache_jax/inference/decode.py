"""The second half of an answer, from logits and a state: all tokens at once, or one after another."""

from collections.abc import Iterator

import jax
import numpy as np

from vlcache_jax.cache.geometry import answer_room
from vlcache_jax.cache.state import KVState
from vlcache_jax.errors import InputError
from vlcache_jax.inference.decode_step import check_room
from vlcache_jax.inference.finiteness import is_ready, require_finite
from vlcache_jax.inference.loop import DecodingState, begin, chunk
from vlcache_jax.inference.row_options import RowOptions, Samplings, StopIds, row_options
from vlcache_jax.parallel.mesh import on_every_process, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.parallel.seeds import Seeds
from vlcache_jax.typing import Params, VisionLanguageModel


def decode(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    max_new_tokens: int,
    *,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The second half of `generate`: answers from what a context's `start` returned.

    Args:
      model, params, sampling, seeds, eos_token_ids, kernels: as in `generate`.
      logits: of the first token, f32 [batch, vocab].
      state: from `Context.start`. It stays valid: several answers may be drawn from one. (A rule that rewrites the
        context works on a copy of it.)
      max_new_tokens: at most what the state was made for, unless the policy's rule lets answers grow longer.

    Returns:
      (tokens i32 [batch, max_new_tokens], lengths i32 [batch]), as in `Generation`.

    Raises:
      InputError: seeds that do not fit, or max_new_tokens beyond the state's room or the model's positions. What
        depends on the values of a state that is still being computed is checked when all has run.
      NonFiniteError: as in `generate`. Inside `jit` nothing tells: use `generate`, or `decode_step` and `state.finite`.
    """
    _check_count(state, max_new_tokens)
    if is_ready(state.next_position):
        _check_values(model, state, max_new_tokens)
    options = row_options(model.spec, logits.shape[0], max_new_tokens, sampling, seeds, eos_token_ids)
    tokens, lengths, finite, _ = decode_all(model, params, logits, state, max_new_tokens, options, kernels)
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
    options: RowOptions,
    kernels: Kernels | None,
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """`decode` without checks of the state.

    Returns:
      Tokens, lengths, whether all was finite, bool [batch], and the log-probabilities of a `DecodingState`.
    """
    room = answer_room(max_new_tokens)
    options, most = placed((options, np.int32(max(room, logits.shape[0]))), params)
    with on_mesh_of(params, logits, state):
        loop, stores = begin(model, logits, state, options, room)
        loop = chunk(model, params, stores, loop, most, most, kernels or Kernels())
        long = (loop.tokens, loop.log_probabilities, loop.sampling_log_probabilities)
        tokens, *logs = (jax.lax.slice_in_dim(x, 0, max_new_tokens, axis=1) for x in long)
    return on_every_process((tokens, loop.step, loop.kv.finite, tuple(logs)))


def stream_decode(
    model: VisionLanguageModel,
    params: Params,
    logits: jax.Array,
    state: KVState,
    max_new_tokens: int,
    *,
    sampling: Samplings = None,
    seeds: Seeds = 0,
    eos_token_ids: StopIds = None,
    kernels: Kernels | None = None,
) -> Iterator[np.ndarray]:
    """The second half of `stream`; arguments as in `decode`, errors as in `decode` and `stream`."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, logits, state))):
        raise InputError("a stream hands its tokens to Python, which a traced program cannot: use generate or decode")
    _check_count(state, max_new_tokens)
    if is_ready(state.next_position):
        _check_values(model, state, max_new_tokens)
    options = row_options(model.spec, logits.shape[0], max_new_tokens, sampling, seeds, eos_token_ids)
    options, one = placed((options, np.int32(1)), params)

    def read(loop: DecodingState) -> tuple[np.ndarray, bool]:
        token, done, finite = on_every_process((loop.token, loop.done, loop.kv.finite))
        token, done = jax.device_get((token, done))
        density = state.allocation.density
        require_finite(finite, token, dtype=model.spec.dtype, before=state.finite, density=density)
        return token, bool(done.all())

    def tokens() -> Iterator[np.ndarray]:
        with on_mesh_of(params, logits, state):
            loop, stores = begin(model, logits, state, options, answer_room(max_new_tokens))
        _check_values(model, state, max_new_tokens)
        token, ended = read(loop)
        yield token
        while not ended:
            with on_mesh_of(params, loop):
                loop = chunk(model, params, stores, loop, one, one, kernels or Kernels())
            token, ended = read(loop)
            yield token

    return tokens()


def _check_count(state: KVState, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer: give at least 1")
    if not state.decoding.unlimited and max_new_tokens > state.tail.capacity:
        raise InputError(
            f"max_new_tokens={max_new_tokens} must lie between 1 and {state.tail.capacity}, the room of this "
            "state: prefill with a larger max_new_tokens, or with another Policy.decoding"
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
