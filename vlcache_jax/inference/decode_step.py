"""One decode step: the same function under a Python loop, a stream or `lax.while_loop`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.state import KVState
from vlcache_jax.errors import InputError
from vlcache_jax.inference.finiteness import finite_rows
from vlcache_jax.inference.forward import contrasted, embed_text, last_logits, run_layers
from vlcache_jax.parallel.mesh import automatic, on_every_process, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.typing import Params, VisionLanguageModel


def decode_step(
    model: VisionLanguageModel,
    params: Params,
    tokens: jax.Array,
    state: KVState,
    *,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, KVState]:
    """Appends one token per row and returns the logits of the next.

    Differentiable: derivatives look at all slots of a store at every layer, so they are for short prompts.

    Args:
      model: the model that made `state`.
      params: its parameters.
      tokens: i32 [batch], the tokens to append.
      state: from `prefill` or the previous step. Its context is passed on as it is; its tail is copied, so that the
        old state stays valid (branches may share it); so is the context where the policy's rule rewrites it. To update
        in place, jit your own loop and donate the state.
      kernels: which implementations to use; the platform's best by default.

    Returns:
      (logits f32 [batch, vocab], new state). A row whose logits are not finite has `finite` False in the new state.

    Raises:
      InputError: the tail of a row is full, where it is never evicted from. Inside `jit`, where that is not known, such
        a row's logits are NaN.
    """
    check_room(state, 1)
    tokens = placed(tokens if isinstance(tokens, jax.Array) else np.asarray(tokens, np.int32), params)
    with on_mesh_of(params, tokens, state):
        return _decode_step(model, params, tokens, state, kernels or Kernels())


def check_room(state: KVState, tokens: int) -> None:
    """Raises if `tokens` more cannot be appended; waits for the state, unless it is traced.

    Raises:
      InputError: the tail of a row is too full.
    """
    tail = state.tail
    if state.decoding.unlimited or isinstance(tail.length, jax.core.Tracer):
        return
    taken = jax.device_get(on_every_process(tail.length)).max()
    if taken + tokens > tail.capacity:
        raise InputError(
            f"the state has no room for {'another token' if tokens == 1 else f'{tokens} tokens'} (capacity "
            f"{tail.capacity}, of which {taken} are taken): prefill with a larger max_new_tokens, or choose "
            "another rule for generated tokens (Policy.decoding)"
        )


@partial(jax.jit, static_argnames=("model", "kernels"))
@automatic
def _decode_step(
    model: VisionLanguageModel, params: Params, tokens: jax.Array, state: KVState, kernels: Kernels
) -> tuple[jax.Array, KVState]:
    return advance(model, params, tokens.astype(jnp.int32), state, kernels)


def advance(
    model: VisionLanguageModel, params: Params, tokens: jax.Array, state: KVState, kernels: Kernels
) -> tuple[jax.Array, KVState]:
    """`decode_step` without checks and compilation of its own, to be traced inside other programs."""
    fits = _fits(state)
    state = state.decoding.make_room(state, model.spec)
    attend, carry, close = state.decoding.attend(state, kernels, model.spec)
    one = jnp.ones_like(state.next_position)
    embedded = embed_text(model, params, tokens[:, None], state.next_position, one)
    layers = jax.lax.iota(jnp.int32, model.spec.num_layers)
    hidden, carry, _ = run_layers(model, params, embedded, attend, carry, layers)
    logits = last_logits(model, params, hidden, one)
    logits = contrasted(model, params, logits, embedded.hidden[:, 0], state.decoding.contrast)
    logits = jnp.where(fits[:, None], logits, jnp.nan)
    new = close(carry)
    tail = dataclasses.replace(new.tail, length=new.tail.length + 1)
    finite = state.finite & finite_rows(logits)
    position, index = embedded.next_position, new.next_index + 1
    return logits, dataclasses.replace(new, tail=tail, next_position=position, next_index=index, finite=finite)


def _fits(state: KVState) -> jax.Array:
    """bool [batch]: whether a row can be appended to, as data."""
    return state.decoding.unlimited | (state.tail.length < state.tail.capacity)
