"""One decode step: the same function under a Python loop, a stream or `lax.while_loop`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from vlcache_jax import ops
from vlcache_jax.errors import InputError
from vlcache_jax.interfaces import Params, VisionLanguageModel
from vlcache_jax.kernels.decode_attention import Segments, Store
from vlcache_jax.ops import Kernels, on_mesh_of
from vlcache_jax.state import KVState, TailStore


def decode_step(
    model: VisionLanguageModel,
    params: Params,
    tokens: jax.Array,
    state: KVState,
    *,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, KVState]:
    """Appends one token per row and returns the logits of the next.

    Args:
      model: the model that made `state`.
      params: its parameters.
      tokens: i32 [batch], the tokens to append.
      state: from `prefill` or the previous step. Its context is passed on as it is; its tail is copied, so that the
        old state stays valid (branches may share it). To update in place, jit your own loop and donate the state.
      kernels: which implementations to use; the platform's best by default.

    Returns:
      (logits f32 [batch, vocab], new state).

    Raises:
      InputError: the tail is full (checked outside `jit` only).
    """
    length = state.tail.length
    if not isinstance(length, jax.core.Tracer) and int(jnp.max(length)) >= state.tail.capacity:
        raise InputError(
            f"the state has no room for another token (capacity {state.tail.capacity}): prefill with a larger "
            "max_new_tokens"
        )
    with on_mesh_of(params, tokens, state):
        return _decode_step(model, params, jnp.asarray(tokens, jnp.int32), state, kernels or Kernels())


@partial(jax.jit, static_argnames=("model", "kernels"))
def _decode_step(
    model: VisionLanguageModel, params: Params, tokens: jax.Array, state: KVState, kernels: Kernels
) -> tuple[jax.Array, KVState]:
    return advance(model, params, tokens, state, kernels)


def advance(
    model: VisionLanguageModel, params: Params, tokens: jax.Array, state: KVState, kernels: Kernels
) -> tuple[jax.Array, KVState]:
    """`decode_step` without checks and compilation of its own, to be traced inside other programs."""
    tail = state.tail
    slot = jnp.max(tail.length)

    def attend(query, key, value, pools, layer):
        start = (0, 0, layer * tail.capacity + slot, 0)
        pools = tuple(
            jax.lax.dynamic_update_slice(pool, x.swapaxes(1, 2).astype(pool.dtype), start)
            for pool, x in zip(pools, (key, value))
        )
        length = tail.length[:, None] + 1
        new = Segments(jnp.full_like(length, layer * tail.capacity), length)
        parts = [*(store.layer(layer) for store in state.stores), (Store(*pools), new)]
        out, _ = ops.union_attention(kernels, query[:, 0], parts)
        return out[:, None], pools, None

    variables = {"params": params}
    hidden = model.apply(variables, tokens[:, None], method="embed_tokens")
    hidden, (keys, values), _ = model.apply(
        variables,
        hidden,
        state.next_position[:, None],
        attend,
        (tail.keys, tail.values),
        jnp.arange(model.spec.num_layers),
        method="decode",
    )
    logits = model.apply(variables, hidden[:, 0], method="unembed")
    tail = TailStore(keys, values, tail.length + 1, capacity=tail.capacity)
    return logits, dataclasses.replace(state, tail=tail, next_position=state.next_position + 1)
