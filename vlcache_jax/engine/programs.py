"""What the device runs for an engine: at most two programs for a bucket, three with questions, and three for the rows.

read_prompts    a micro-batch of prompts to what `insert_rows` takes; for each bucket
insert_rows     rows begin their answers (`inference.rows`); for each bucket
ask             questions behind prompts, in engines that take some; for each bucket
free_rows       all rows, once
decode_chunk    some steps of all rows
end_rows        rows whose answers hold a stop text
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.geometry import align
from vlcache_jax.engine.buckets import Bucket, padding
from vlcache_jax.inference.append_block import append_block
from vlcache_jax.inference.finiteness import finite_rows
from vlcache_jax.inference.loop import DecodingState
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.row_options import RowOptions, row_options
from vlcache_jax.inference.rows import Prompt, decode_chunk, free_rows, insert_rows
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.mesh import automatic, on_mesh_of, rows_over
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.typing import Params, VisionLanguageModel

OF_ROWS = 3
"""Programs that no bucket changes."""


@partial(jax.jit, static_argnames=("model", "recipe", "kernels"))
def read_prompts(
    model: VisionLanguageModel,
    params: Params,
    batch: Batch,
    recipe: Recipe,
    kernels: Kernels,
) -> tuple[Prompt, tuple[jax.Array, jax.Array]]:
    """Compressed prompts without the parameters that a context holds; `kept_fraction` and `exact` of their report."""
    ctx = prefill(model, params, batch, recipe, kernels=kernels)
    return Prompt.of(ctx), (ctx.report.kept_fraction, ctx.report.exact)


@partial(jax.jit, static_argnames=("model", "kernels"))
def ask(
    model: VisionLanguageModel,
    params: Params,
    prompt: Prompt,
    of: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    kernels: Kernels,
) -> Prompt:
    """Questions i32 [rows, length] behind the rows `of` a prompt, i32 [rows]; of length 0 where there is none."""
    asked = jax.tree.map(lambda x: x[of * x.shape[0] // len(prompt.logits)], prompt)
    kv, none, room = asked.kv, lengths == 0, int(align(tokens.shape[1]))
    where = (kv.stores, kv.next_position, kv.next_index)
    logits, store = append_block(model, params, *where, tokens, jnp.maximum(lengths, 1), room, 0, kernels)
    store = dataclasses.replace(store, lengths=jnp.where(none[:, None, None], 0, store.lengths))
    logits = jnp.where(none[:, None], asked.logits, logits)
    kv = dataclasses.replace(
        kv,
        more=(*kv.more, store),
        next_position=kv.next_position + lengths,
        next_index=kv.next_index + lengths,
        finite=kv.finite & finite_rows(logits),
    )
    return Prompt(kv, logits)


@partial(jax.jit, donate_argnames=("done",))
@automatic
def _ended(done: jax.Array, stopped: jax.Array) -> jax.Array:
    return done | stopped


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of an engine, with all that stays the same in every call.

    Attributes:
      model, params, kernels: as in `generate`.
      recipe: what to keep, to look at and to drop.
      rows: of the decode batch.
      room: tokens of an answer.
      question_tokens: room for a question; 0 for none.
      stop_ids: the most of an answer.
      top_count: likeliest tokens that are kept in the place of each; None for none.
    """

    model: VisionLanguageModel
    params: Params
    recipe: Recipe
    kernels: Kernels
    rows: int
    room: int
    question_tokens: int
    stop_ids: int
    top_count: int | None = None

    @property
    def split(self) -> int:
        """Devices over which the mesh of the parameters splits rows."""
        return rows_over(self.params)

    def read(self, batch: Batch) -> tuple[Prompt, tuple[jax.Array, jax.Array]]:
        """Prefill; waits for nothing."""
        batch = placed(batch, self.params)
        with on_mesh_of(self.params):
            return read_prompts(self.model, self.params, batch, self.recipe, self.kernels)

    def ask(self, prompt: Prompt, of: list[int], questions: list[np.ndarray]) -> Prompt:
        """As many rows as the prompt has, of which the first are `of` it, with questions behind them."""
        rows, count = len(prompt.logits), len(of)
        tokens, lengths = np.zeros((rows, self.question_tokens), np.int32), np.zeros(rows, np.int32)
        for row, question in enumerate(questions):
            tokens[row, : len(question)], lengths[row] = question, len(question)
        arrays = placed((np.array(of + [0] * (rows - count), np.int32), tokens, lengths), self.params)
        with on_mesh_of(self.params, prompt):
            return ask(self.model, self.params, prompt, *arrays, self.kernels)

    def free(self, prompt: Prompt) -> DecodingState:
        """Rows for prompts of this size and smaller ones."""
        options = placed(self.options(self.rows), self.params)
        with on_mesh_of(self.params, prompt):
            return free_rows(self.model, prompt, options, self.rows, self.room, self.top_count)

    def options(self, rows: int) -> RowOptions:
        """Of rows of which nothing is asked."""
        return row_options(self.model.spec, rows, 1, most_stop_ids=self.stop_ids)

    def insert(
        self, state: DecodingState, prompt: Prompt, rows: list[int], of: list[int], options: RowOptions
    ) -> DecodingState:
        """Begins answers in rows, to the rows `of` a prompt, as options say; at most as many as it has."""
        count, most = len(rows), len(prompt.logits)
        numbers = (*(np.array(x + [0] * (most - count), np.int32) for x in (rows, of)), np.int32(count))
        options, numbers = placed((options, numbers), self.params)
        with on_mesh_of(self.params, state):
            return insert_rows(self.model, state, prompt, *numbers, options)

    def decode(self, state: DecodingState, steps: int, leave_after: int) -> DecodingState:
        """See `decode_chunk`."""
        return decode_chunk(self.model, self.params, state, steps, leave_after=leave_after, kernels=self.kernels)

    def end(self, state: DecodingState, rows: list[int]) -> DecodingState:
        """Ends rows before their time."""
        stopped = placed(np.isin(np.arange(self.rows), rows), self.params)
        with on_mesh_of(self.params, state):
            return dataclasses.replace(state, done=_ended(state.done, stopped))

    def nothing(self, bucket: Bucket, rows: int) -> Batch:
        """A micro-batch of prompts of one token, to warm up with."""
        return dataclasses.replace(padding(bucket.shapes(self.model, rows)), lengths=np.ones(rows, np.int32))


def stacked(batches: list[Batch], rows: int) -> Batch:
    """A micro-batch from batches of one row; the first one fills what is left."""
    batches = batches + batches[:1] * (rows - len(batches))
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def chosen(options: list[tuple[RowOptions, int]], rows: int) -> RowOptions:
    """Options of rows of others, the first one for those that are left."""
    options = options + options[:1] * (rows - len(options))
    of_rows = [jax.tree.map(lambda x: x[row], one) for one, row in options]  # noqa: B023
    return jax.tree.map(lambda *x: np.stack(x), *of_rows)
