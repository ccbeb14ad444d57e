"""A compressed prompt, which serves any number of questions, samples and turns.

    ctx = compress(model, params, batch, policy)      prefill; what the policy keeps
    out = answer(ctx, questions)                      each question is one block, each answer a loop on the device
    ctx = extend(ctx, questions, out)                 the next turn of the conversation starts from here

A context is never changed and never repeated: every question reads the same buffers (`kernels.decode_attention.union`).
Where the policy's rule for generated tokens rewrites what was kept, answers work on a copy.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import answer_room
from vlcache_jax.cache.state import Allocation, KVState
from vlcache_jax.cache.store import PackedStore
from vlcache_jax.cache.tail import TailStore
from vlcache_jax.errors import InputError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.inference.finiteness import is_ready
from vlcache_jax.inference.report import Report
from vlcache_jax.parallel.mesh import automatic, is_known, on_mesh_of
from vlcache_jax.policies.decoding.append import APPEND
from vlcache_jax.typing import Params, VisionLanguageModel


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Compressed prompts that can be asked, as often as one likes. A pytree; immutable.

    Attributes:
      model: the model that it belongs to (static).
      params: its parameters: a reference, not a copy.
      stores: the kept part of the prompt, then what was appended. Stores of earlier stages may have fewer rows: a
        divisor of `rows`; consecutive rows share theirs.
      next_position: i32 [rows]. Rotary position of the next token.
      next_index: i32 [rows]. How many tokens there were, kept or not: what positions in stores count.
      logits: f32 [rows, vocab]. Of the next token.
      allocation: how the budget was shared out; of the rows that were compressed.
      report: what was kept; its `finite` is of the context's rows.
      room: slots a layer has in the last store, if that was appended; 0 otherwise (static).
      decoding: what becomes of generated tokens: the policy's rule (static).
      observed: what the rule remembers of the prompt's attention, a pytree of its own; None with most rules.
    """

    model: VisionLanguageModel = dataclasses.field(metadata={"static": True})
    params: Params
    stores: tuple[PackedStore, ...]
    next_position: jax.Array
    next_index: jax.Array
    logits: jax.Array
    allocation: Allocation
    report: Report
    room: int = dataclasses.field(default=0, metadata={"static": True})
    decoding: Any = dataclasses.field(default=APPEND, metadata={"static": True})
    observed: Any = None

    @property
    def rows(self) -> int:
        """Prompts, or branches of them."""
        return self.next_position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its stores."""
        return sum(store.nbytes for store in self.stores)

    def kept_positions(self, layer: int) -> jax.Array:
        """As `KVState.kept_positions`, of the rows that were compressed."""
        return self.stores[0].kept_positions(layer)

    def start(self, max_new_tokens: int, rows: int | None = None) -> tuple[jax.Array, KVState]:
        """What `decode`, `stream_decode` and `decode_step` go on from, for loops of one's own.

        Args:
          max_new_tokens: room for generated tokens, where the rule keeps them all; elsewhere answers may grow longer.
            The room comes in a few sizes, so that another number compiles nothing (`cache.geometry.answer_room`).
          rows: a multiple of the context's rows, for several branches of each; the context's own by default.

        Returns:
          (logits of the next token f32 [rows, vocab], state); the state holds the context's own buffers, unless the
          rule rewrites them and there are several branches.

        Raises:
          InputError: max_new_tokens below 1, rows that are no multiple, or more positions than the model has; the last,
            where the context is still being computed, comes from `decode` or `stream_decode`.

        Example:
          logits, state = vlc.compress(vlm.model, vlm.params, batch, policy).start(max_new_tokens=64)
        """
        rows = self.rows if rows is None else rows
        if rows < 1 or rows % self.rows:
            raise InputError(f"rows={rows} is not a multiple of the context's {self.rows} rows")
        check_count("max_new_tokens", max_new_tokens)
        if is_ready(self.next_position):
            check_positions(self, np.zeros(self.rows, np.int32), max_new_tokens)
        return started(self, max_new_tokens, rows)


def started(ctx: Context, max_new_tokens: int, rows: int) -> tuple[jax.Array, KVState]:
    """`Context.start` of arguments that fit; reads nothing."""
    room = ctx.decoding.tail_tokens(answer_room(max_new_tokens))
    own = (ctx.stores, ctx.observed) if ctx.decoding.rewrites_context else ()
    with on_mesh_of(ctx.params, ctx.stores):
        each = (ctx.logits, (ctx.next_position, ctx.next_index), ctx.report.finite, own)
        tail, (logits, (position, index), finite, own) = _start(ctx.model, each, rows, room)
    (context, *more), observed = own or (ctx.stores, ctx.observed)
    return logits, KVState(context, tail, position, index, ctx.allocation, finite, ctx.decoding, tuple(more), observed)


@partial(jax.jit, static_argnames=("model", "rows", "room"))
@automatic
def _start(model: VisionLanguageModel, each: Any, rows: int, room: int) -> tuple[TailStore, Any]:
    """An empty tail, and arrays of the context's rows for each of their branches."""
    return TailStore.empty(model.spec, rows, room), jax.tree.map(lambda x: branches(x, rows), each)


def branches(x: jax.Array, rows: int) -> jax.Array:
    """Repeats each of the context's rows for its branches."""
    return x if rows == x.shape[0] else jnp.repeat(x, rows // x.shape[0], axis=0)


@automatic
def by_entry(tree: Any, shape: tuple[int, ...]) -> Any:
    """Arrays of all entries [entries, ...] as [*shape, ...], on whatever mesh."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)


def check_positions(ctx: Context, appended: Any, new_tokens: int) -> None:
    """`appended` tokens of each entry, then as many new ones, must have a position."""
    if not (is_known(ctx.next_position) and is_known(appended)):
        return
    before, appended = jax.device_get(ctx.next_position), jax.device_get(appended)
    before = np.repeat(before, len(appended) // len(before))
    needed, most = before + appended + new_tokens, ctx.model.spec.max_positions
    row = int(np.argmax(needed))
    if needed[row] > most:
        raise InputError(
            f"row {row} needs {needed[row]} positions ({before[row]} of the context + {appended[row]} appended + "
            f"{new_tokens} new ones) but the model has {most}: shorten the text or lower max_new_tokens"
        )


def check_count(name: str, value: Any) -> None:
    """Raises InputError if a number is none, or below 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}={value!r}: give a whole number of at least 1")
