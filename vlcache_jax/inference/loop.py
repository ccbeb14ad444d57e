"""The loop over tokens, on the device: `generate`, `stream` and whoever fills rows anew run this one.

begin    first tokens, from the prompts' logits
chunk    a number of steps, or until rows have ended
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.decode_step import advance
from vlcache_jax.inference.finiteness import usable_rows
from vlcache_jax.inference.next_token import likeliest, next_token
from vlcache_jax.inference.row_options import RowOptions
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import automatic
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.typing import Params, VisionLanguageModel


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class DecodingState:
    """Rows that are being answered, each at a step of its own. A pytree of fixed shapes; see `empty_rows`.

    Attributes:
      kv: their caches. `kv.finite`, bool [rows], is False where an answer means nothing.
      options: what is asked of each row: seed, temperature, top-k, top-p, stop ids and length, as arrays.
      token: i32 [rows]. The last token of each, which its cache has not seen yet; the pad id once the row has ended.
      step: i32 [rows]. Tokens of its answer so far.
      done: bool [rows]. Whether it has ended, or never was filled.
      tokens: i32 [rows, room]. The answers, filled with the pad id.
      log_probabilities, sampling_log_probabilities: f32 [rows, room]. Of the tokens, as `Generation` has them, of rows
        that ask for them; else 0.
      top: None, or i32 and f32 [rows, room, n]: the likeliest tokens in the place of each, and their log-probabilities
        under the model.
    """

    kv: KVState
    options: RowOptions
    token: jax.Array
    step: jax.Array
    done: jax.Array
    tokens: jax.Array
    log_probabilities: jax.Array
    sampling_log_probabilities: jax.Array
    top: tuple[jax.Array, jax.Array] | None = None

    @property
    def top_count(self) -> int | None:
        """How many likeliest tokens are kept; None for none."""
        return None if self.top is None else self.top[0].shape[-1]


def begin(
    model: VisionLanguageModel, logits: jax.Array, kv: KVState, options: RowOptions, room: int
) -> tuple[DecodingState, tuple[PackedStore, ...]]:
    """The first token of each row.

    Args:
      model: for its pad id.
      logits: f32 [rows, vocab].
      kv: as a context's `start` returned it; it stays as it is.
      options: of the rows.
      room: tokens that an answer has room for, at least all `options.max_new_tokens`.

    Returns:
      The state, which `chunk` may overwrite, without the read-only stores; and those.
    """
    stores = () if kv.decoding.rewrites_context else kv.stores
    return _begin(model, logits, without_stores(kv), options, room), stores


@partial(jax.jit, static_argnames=("model", "room"))
@automatic
def _begin(model: VisionLanguageModel, logits: jax.Array, kv: KVState, options: RowOptions, room: int) -> DecodingState:
    logits, kv, options = jax.tree.map(jnp.copy, without_derivative((logits, kv, options)))
    return begun(model, logits, kv, options, room)


def begun(
    model: VisionLanguageModel,
    logits: jax.Array,
    kv: KVState,
    options: RowOptions,
    room: int,
    top_count: int | None = None,
) -> DecodingState:
    """`begin`, to be traced inside other programs; results may be arguments."""
    token, *logs = next_token(logits, options, jnp.zeros(logits.shape[:1], jnp.int32))
    tokens = jnp.full((len(token), room), model.spec.pad_token_id, jnp.int32).at[:, 0].set(token)
    of_model, of_draw = (jnp.zeros(tokens.shape, jnp.float32).at[:, 0].set(log) for log in logs)
    top = jax.tree.map(
        lambda x: jnp.zeros((len(x), room, *x.shape[1:]), x.dtype).at[:, 0].set(x),
        likeliest(logits, options, top_count),
    )
    done = options.stops(token) | (options.max_new_tokens <= 1)
    kv = dataclasses.replace(kv, finite=kv.finite & usable_rows(logits))
    return DecodingState(kv, options, token, jnp.ones_like(token), done, tokens, of_model, of_draw, top)


@partial(jax.jit, static_argnames=("model", "kernels"), donate_argnames=("state",))
@automatic
def chunk(
    model: VisionLanguageModel,
    params: Params,
    stores: tuple[PackedStore, ...],
    state: DecodingState,
    steps: jax.Array,
    enough: jax.Array,
    kernels: Kernels,
) -> DecodingState:
    """Runs at most `steps` steps, i32 [], until all rows have ended, or `enough` of them, i32 [], in this chunk.

    `state`, without its read-only stores, is donated.
    """
    before = state.done

    def unfinished(carry: tuple[jax.Array, DecodingState]) -> jax.Array:
        count, state = carry
        ended = jnp.sum(state.done & ~before, dtype=jnp.int32)
        return (count < steps) & ~jnp.all(state.done) & (ended < enough)

    def body(carry: tuple[jax.Array, DecodingState]) -> tuple[jax.Array, DecodingState]:
        count, state = carry
        return count + 1, _step(model, params, stores, state, kernels)

    params, stores, state = without_derivative((params, stores, state))
    carry = varying((jnp.zeros((), jnp.int32), state), params, stores, state)
    return jax.lax.while_loop(unfinished, body, carry)[1]


def _step(
    model: VisionLanguageModel, params: Params, stores: tuple[PackedStore, ...], state: DecodingState, kernels: Kernels
) -> DecodingState:
    logits, kv = advance(model, params, state.token, with_stores(state.kv, stores), kernels)
    done, step = state.done, state.step
    kv = dataclasses.replace(
        kv,
        finite=jnp.where(done, state.kv.finite, kv.finite),
        next_position=jnp.where(done, state.kv.next_position, kv.next_position),
        next_index=jnp.where(done, state.kv.next_index, kv.next_index),
        tail=dataclasses.replace(kv.tail, length=jnp.where(done, 0, kv.tail.length)),  # never full, and soon read
    )
    token, of_model, of_draw = next_token(logits, state.options, step)
    top = likeliest(logits, state.options, state.top_count)
    token = jnp.where(done, model.spec.pad_token_id, token)
    here = (jax.lax.iota(jnp.int32, state.tokens.shape[1])[None] == step[:, None]) & ~done[:, None]
    step = jnp.where(done, step, step + 1)
    return DecodingState(
        kv=without_stores(kv),
        options=state.options,
        token=token,
        step=step,
        done=done | state.options.stops(token) | (step >= state.options.max_new_tokens),
        tokens=jnp.where(here, token[:, None], state.tokens),
        log_probabilities=jnp.where(here, of_model[:, None], state.log_probabilities),
        sampling_log_probabilities=jnp.where(here, of_draw[:, None], state.sampling_log_probabilities),
        top=jax.tree.map(lambda new, old: jnp.where(here[..., None], new[:, None], old), top, state.top),
    )


def without_stores(kv: KVState) -> KVState:
    """What a step changes: a state without what is read-only."""
    return _replaced(kv, (None,))


def with_stores(kv: KVState, stores: tuple[PackedStore, ...]) -> KVState:
    """What `without_stores` left, and the stores again."""
    return _replaced(kv, stores)


def _replaced(kv: KVState, stores: tuple[Any, ...]) -> KVState:
    if kv.decoding.rewrites_context:
        return kv
    return dataclasses.replace(kv, context=stores[0], more=stores[1:])


@jax.custom_jvp
def without_derivative(tree: Any) -> Any:
    """A tree whose derivative is refused."""
    return tree


@without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise InputError(
        "generated tokens are whole numbers and have no derivative with respect to the parameters: take the "
        "log-probabilities of an answer from one pass over prompt and answer, model.apply({'params': params}, batch, "
        "method='forward') (docs/training.md), and call generate, decode or answer outside of what is differentiated, "
        "or with jax.lax.stop_gradient(params)"
    )
