"""`Recompress`: now and then the generated tokens and what is in the context compete for the context's slots.

    context   | a b c d |  e f g . |        tail   | s t u |  v w x |        c, e and g are weakest, with t, w and x ...
    context'  | a b s d |  v f u?  ...                                       ... a token that stays never moves

Tokens that stay keep their slots; generated ones take the slots of those that go. So the store is rewritten in place
and the order within a segment is lost, which nothing depends on. Everything is local to a row and a lane.
"""

import dataclasses
import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.cache.geometry import ALIGNMENT, align
from vlcache_jax.cache.selection import as_unsigned, highest, indices
from vlcache_jax.cache.state import KVState
from vlcache_jax.cache.store import PackedStore, lanes_spec, split
from vlcache_jax.cache.tail import TailStore
from vlcache_jax.errors import PolicyError
from vlcache_jax.files.exporting import exportable
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import local
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.decoding.append import appending
from vlcache_jax.policies.decoding.rule import Prompt, Step, WeighingRule, check_count, check_ring, named
from vlcache_jax.policies.parts import Parts
from vlcache_jax.policies.scores.attention import LayerInputs
from vlcache_jax.policies.window import forced
from vlcache_jax.typing import ModelSpec

_SCORED, _MOVED = 128, 1024  # slots of a lane at once
_LAST = jnp.iinfo(jnp.int32).max

_Both = tuple[jax.Array, jax.Array]
"""Of the context [batch, lanes, slots] and of the tail [batch, lanes, segments, every]."""


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class RecentQueries:
    """What `Recompress` knows of the latest steps: a ring of `rows` of them for each layer.

    Attributes:
      queries: [batch, heads, layers * rows, head_dim], rotated.
      lse: f32 [batch, heads, layers * rows]. The log-sum-exp of their scaled logits over all that they saw.
      rows: of the ring (static).
    """

    queries: jax.Array
    lse: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})

    def note(
        self, kernels: Kernels, query: jax.Array, lse: jax.Array, layer: jax.Array, slot: jax.Array
    ) -> "RecentQueries":
        """With a step's queries [batch, heads, head_dim] and lse [batch, heads] in slots i32 [batch] of a layer."""
        rows = self.rows
        (queries,) = ops.append(kernels, (self.queries,), (query,), layer * rows + slot)
        here = jax.lax.iota(jnp.int32, rows)[None, None] == slot[:, None, None]
        old = jax.lax.dynamic_slice_in_dim(self.lse, layer * rows, rows, axis=2)
        new = jnp.where(here, lse[..., None], old)
        return RecentQueries(queries, jax.lax.dynamic_update_slice_in_dim(self.lse, new, layer * rows, axis=2), rows)

    def partition_specs(self) -> "RecentQueries":
        """See `PackedStore.partition_specs`."""
        spec = lanes_spec(*self.queries.shape[:2])
        return RecentQueries(spec, spec, self.rows)  # type: ignore[arg-type]


@named("recompress", count="TOKENS")
@dataclasses.dataclass(frozen=True)
class Recompress(WeighingRule):
    """Every `every` generated tokens, they and what was kept before compete again for the context's slots.

    After ZipCache, which compresses every 100 tokens. Between two compressions the tail holds the new tokens. Then, in
    each layer and KV head, as many tokens stay as were kept of the prompt: the latest ones, the sinks, and the best by

        score_j = sum over the last `rows` generated tokens q of A[q, j], averaged over the query heads of a KV head

    whatever scored the prompt; `Policy.protect` no longer counts. Steps in between cost nothing more: they note their
    queries and the log-sum-exp of their logits, and the scores are worked out from those when they are needed.

    Attributes:
      every: tokens between two compressions, and the tail's room.
      rows: generated tokens that score, at most `every`. None: min(every, 32).
      recent: as in `Policy`; None for the policy's.
      sinks: as in `Policy`; None for the policy's.

    Raises:
      PolicyError: a number out of range.
    """

    every: int = 128
    rows: int | None = None

    def __post_init__(self) -> None:
        check_count("Recompress", "every", self.every)
        check_count("Recompress", "rows", self.scoring_rows)
        if self.scoring_rows > self.every:
            raise PolicyError(f"Recompress(every={self.every}, rows={self.rows}): at most {self.every} rows can score")
        super().__post_init__()

    @property
    def scoring_rows(self) -> int:
        """`rows`, filled in."""
        return min(self.every, 32) if self.rows is None else self.rows

    def tail_tokens(self, max_new_tokens: int) -> int:
        return self.every

    def check_windows(self, largest: int) -> None:
        check_ring("Recompress", "every", self.every, largest)

    def check(self, policy: Parts) -> None:
        if policy.bits is not None or policy.evicted.bits is not None:
            raise PolicyError(
                f"{policy.name}: Recompress rewrites slots, but bits={policy.bits} and evicted={policy.evicted}: "
                "use bits=None and Drop() or Merge(), or Append() or RollingWindow() as decoding"
            )
        super().check(policy)

    def note(self, inputs: LayerInputs) -> jax.Array:
        """See `DecodingRule.note`: zeros, for the queries of generated tokens."""
        batch, _, heads, head_dim = inputs.query.shape
        return jnp.zeros((batch, heads, self.scoring_rows, head_dim), inputs.query.dtype)

    def remember(self, policy: Parts, prompt: Prompt) -> RecentQueries:
        """See `DecodingRule.remember`: an empty ring."""
        layers, batch, heads, rows, head_dim = prompt.noted.shape
        empty = prompt.noted.transpose(1, 2, 0, 3, 4).reshape(batch, heads, layers * rows, head_dim)
        empty = empty.astype(prompt.context.keys.dtype)
        return RecentQueries(split(empty), split(jnp.zeros(empty.shape[:3], jnp.float32)), rows)

    def make_room(self, state: KVState, spec: ModelSpec) -> KVState:
        """See `DecodingRule.make_room`: recompresses the rows whose tail is full.

        A layer with a window keeps out of it: it goes on reading the tail as a ring, in which the step that follows
        overwrites nothing that it still sees.
        """
        context, tail, observed = state.context, state.tail, state.observed
        full = tail.length >= self.every

        def rewritten(keys: jax.Array, values: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
            store = dataclasses.replace(context, keys=keys, values=values, positions=positions)
            return recompress(self, store, tail, observed, state.next_index, full, spec.windows)

        def same(*buffers: jax.Array) -> tuple[jax.Array, ...]:
            return buffers

        buffers = context.keys, context.values, context.positions
        keys, values, positions = jax.lax.cond(jnp.any(full), rewritten, same, *buffers)
        return dataclasses.replace(
            state,
            context=dataclasses.replace(context, keys=keys, values=values, positions=positions),
            tail=dataclasses.replace(tail, length=jnp.where(full, 0, tail.length)),
        )

    def attend(self, state: KVState, kernels: Kernels, spec: ModelSpec) -> Step:
        slot = state.tail.length

        def note(observed: RecentQueries, query: jax.Array, lse: jax.Array, layer: jax.Array) -> RecentQueries:
            return observed.note(kernels, query, lse, layer, slot % self.scoring_rows)

        return appending(state, kernels, spec, slot, slot + 1, note, self._ring(state, spec))

    def _ring(self, state: KVState, spec: ModelSpec) -> tuple[int, jax.Array] | None:
        windowed = [layer for layer, window in enumerate(spec.windows) if window is not None]
        if not windowed:
            return None
        context, layer = state.context, windowed[0]  # which holds the end of the prompt
        end = context.offsets[:, layer, :1] + context.lengths[:, layer, :1] - 1
        last = jnp.take_along_axis(context.positions[:, 0], end, axis=1)[:, 0]
        return self.every, state.next_index - last  # tokens behind it, the step's own included


def recompress(
    rule: Recompress,
    context: PackedStore,
    tail: TailStore,
    observed: RecentQueries,
    next_index: jax.Array,
    full: jax.Array,
    windows: tuple[int | None, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The context's keys, values and positions after it has taken in the tails that are full, bool [batch].

    Layers with one of `windows` (`ModelSpec.windows`) stay as they are.
    """
    spec: Any = lanes_spec(*context.keys.shape[:2])  # heads that share a lane stay together
    row: Any = PartitionSpec(spec[0])
    of_tail = dataclasses.replace(tail, keys=spec, values=spec, length=row)
    inputs = (context.partition_specs(), of_tail, RecentQueries(spec, spec, observed.rows), row, row)
    return local(partial(_recompress, rule, windows), inputs, (spec,) * 3)(context, tail, observed, next_index, full)


def _recompress(
    rule: Recompress,
    windows: tuple[int | None, ...],
    context: PackedStore,
    tail: TailStore,
    observed: RecentQueries,
    next_index: jax.Array,
    full: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`recompress` on one device, for its rows and lanes.

    Segment s = j * layers + l of a lane is layer l of the lane's j-th KV head.
    """
    batch, lanes, slots, _ = context.keys.shape
    layers, kv_heads = context.offsets.shape[1], tail.keys.shape[1]
    every, rows, segments = rule.every, rule.scoring_rows, kv_heads // lanes * layers

    def per_lane(x: jax.Array) -> jax.Array:  # [batch, layers, kv_heads or 1] -> [batch, lanes, segments]
        return jnp.broadcast_to(x, (batch, layers, kv_heads)).swapaxes(1, 2).reshape(batch, lanes, segments)

    offsets, lengths = per_lane(context.offsets), per_lane(context.lengths)
    block = jnp.arange(0, slots, ALIGNMENT, dtype=jnp.int32)[
        None, None, :, None
    ]  # an aligned block lies in one segment
    inside = (block >= offsets[:, :, None]) & (block < (offsets + align(lengths))[:, :, None])
    of_block = jnp.where(jnp.any(inside, axis=-1), jnp.argmax(inside, axis=-1), segments).astype(jnp.int32)
    known = jnp.minimum(of_block, segments - 1)
    segment = jnp.repeat(known, ALIGNMENT, axis=2)  # [batch, lanes, slots]
    start, length = (jnp.take_along_axis(x, segment, axis=2) for x in (offsets, lengths))
    used = (jax.lax.iota(jnp.int32, slots)[None, None] < start + length) & (
        jnp.repeat(of_block, ALIGNMENT, axis=2) < segments
    )

    def unstack(x: jax.Array, room: int) -> jax.Array:  # [batch, kv_heads, layers * room, ...] -> per segment
        return x[:, :, : layers * room].reshape(batch, lanes, segments, room, *x.shape[3:])

    tail_keys, tail_values = (unstack(x, tail.capacity)[:, :, :, :every] for x in (tail.keys, tail.values))
    # [batch, lanes, segments, query heads of the KV head * rows, ...]
    group = observed.queries.shape[1] // kv_heads
    queries, lse = (
        jnp.moveaxis(x.reshape(batch, lanes, kv_heads // lanes, group, layers, rows, *x.shape[3:]), 3, 4).reshape(
            batch, lanes, segments, group * rows, *x.shape[3:]
        )
        for x in (observed.queries, observed.lse)
    )

    old = _context_scores(context.keys, known, queries, lse) / group
    new = _tail_scores(tail_keys, queries, lse, rows) / group

    end = next_index[:, None, None]
    new_positions = jnp.broadcast_to((end - every + jax.lax.iota(jnp.int32, every)[None, None])[:, :, None], new.shape)
    stays, enters = _keep((old, new), (context.positions, new_positions), used, known, offsets, lengths, end, rule)

    leaves = used & ~stays & full[:, None, None]
    if windows:
        evicts = jnp.asarray([window is None for window in windows] * (kv_heads // lanes))
        leaves &= evicts[segment]
    before = jnp.cumsum(leaves, axis=2, dtype=jnp.int32) - leaves.astype(jnp.int32)  # in the lane
    first = jnp.take_along_axis(before, jnp.take_along_axis(offsets, segment, axis=2), axis=2)
    entering = _flat(indices(enters, every))  # their slots in the tail, then `every`
    number = jnp.minimum(before - first, every - 1)
    chosen = jnp.minimum(jnp.take_along_axis(entering, segment * every + number, axis=2), every - 1)
    source = segment * every + chosen
    positions = jnp.where(leaves, jnp.take_along_axis(_flat(new_positions), source, axis=2), context.positions)
    keys = _moved(context.keys, _flat(tail_keys), leaves, source)
    values = _moved(context.values, _flat(tail_values), leaves, source)
    return keys, values, positions


def _flat(x: jax.Array) -> jax.Array:
    """[batch, lanes, segments, every, ...] -> [batch, lanes, segments * every, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _context_scores(keys: jax.Array, of_block: jax.Array, queries: jax.Array, lse: jax.Array) -> jax.Array:
    """Attention that every slot receives from the queries of its segment, f32 [batch, lanes, slots]."""
    batch, lanes, slots, head_dim = keys.shape
    size = math.gcd(slots, _SCORED)
    blocks = size // ALIGNMENT

    def chunk(i: jax.Array) -> jax.Array:
        k = jax.lax.dynamic_slice_in_dim(keys, i * size, size, axis=2)
        k = k.reshape(batch, lanes, blocks, ALIGNMENT, head_dim)
        segment = jax.lax.dynamic_slice_in_dim(of_block, i * blocks, blocks, axis=2)[..., None]
        q = jnp.take_along_axis(queries, segment[..., None], axis=2)
        return _received(q, k, jnp.take_along_axis(lse, segment, axis=2)).reshape(batch, lanes, size)

    scores = jax.lax.map(chunk, jax.lax.iota(jnp.int32, slots // size))
    return jnp.moveaxis(scores, 0, 2).reshape(batch, lanes, slots)


def _tail_scores(keys: jax.Array, queries: jax.Array, lse: jax.Array, rows: int) -> jax.Array:
    """The same for the tail, f32 [batch, lanes, segments, every]: a query does not see what came after it."""
    every = keys.shape[3]
    ring = jax.lax.iota(jnp.int32, rows)
    asked_at = every - 1 - (every - 1 - ring) % rows  # tail slot of the token whose query it was
    seen = jax.lax.iota(jnp.int32, every)[None] <= asked_at[:, None]  # [rows, every]

    def one(parts: tuple[jax.Array, ...]) -> jax.Array:
        k, q, weight = parts
        return _received(q, k, weight, jnp.tile(seen, (q.shape[2] // rows, 1)))

    parts = tuple(jnp.moveaxis(x, 2, 0) for x in (keys, queries, lse))
    return jnp.moveaxis(jax.lax.map(one, parts), 0, 2)


def _received(query: jax.Array, key: jax.Array, lse: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Column sums: query [..., n, d], key [..., s, d], lse [..., n], seen [n, s] -> f32 [..., s]."""
    logits = query.shape[-1] ** -0.5 * jnp.einsum("...nd,...sd->...ns", query, key, preferred_element_type=jnp.float32)
    probabilities = jnp.exp(logits - lse[..., None])
    if seen is not None:
        probabilities = jnp.where(seen, probabilities, 0)
    return jnp.sum(probabilities, axis=-2)


def _keep(
    scores: _Both,
    positions: _Both,
    used: jax.Array,
    of_block: jax.Array,
    offsets: jax.Array,
    lengths: jax.Array,
    end: jax.Array,
    rule: Recompress,
) -> _Both:
    """Which entries stay: as many in each segment as it has slots, the strongest; of equal ones the older.

    Two searches for a threshold of each segment, bit by bit: a sort takes the TPU's compiler a minute.

    used bool [batch, lanes, slots]; of_block i32 [batch, lanes, slots / ALIGNMENT], the segment of a block; offsets and
    lengths i32 [batch, lanes, segments]; end i32 [batch, 1, 1]; scores f32, positions i32 -> bool.
    """

    def spread(x: jax.Array) -> _Both:  # [batch, lanes, segments]
        return jnp.repeat(jnp.take_along_axis(x, of_block, axis=2), ALIGNMENT, axis=2), x[..., None]

    def count(marks: _Both) -> jax.Array:  # -> i32 [batch, lanes, segments]
        of_blocks = jnp.sum(marks[0].reshape(*of_block.shape, ALIGNMENT), axis=3, dtype=jnp.int32)
        before = jnp.pad(jnp.cumsum(of_blocks, axis=2, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
        ends = (offsets // ALIGNMENT, (offsets + align(lengths)) // ALIGNMENT)
        first, last = (jnp.take_along_axis(before, x, axis=2) for x in ends)
        return last - first + jnp.sum(marks[1], axis=3, dtype=jnp.int32)

    def largest(numbers: _Both, wanted: jax.Array) -> tuple[_Both, _Both]:
        """Marks those above the wanted-th largest of their segment, and those equal to it. Zeros are not there."""
        reached = highest(lambda t: count(jax.tree.map(operator.ge, numbers, spread(t))) >= wanted, wanted.shape)
        return tuple(jax.tree.map(compare, numbers, spread(reached)) for compare in (operator.gt, operator.eq))

    latest, first = (spread(x) for x in forced(lengths, *rule.forced))
    numbers = []
    for score, position, after, late, early in zip(scores, positions, (end, end[..., None]), latest, first):
        must = (position >= after - late) | (position < early)
        score = jnp.nan_to_num(score, nan=jnp.finfo(jnp.float32).min)
        numbers.append(as_unsigned(jnp.where(must, jnp.inf, score)))
    strong, equal = largest((jnp.where(used, numbers[0], 0), numbers[1]), lengths)
    ages = jax.tree.map(lambda e, position: jnp.where(e, _LAST - position, 0).astype(jnp.uint32), equal, positions)
    older, oldest = largest(ages, lengths - count(strong))
    return jax.tree.map(lambda *marks: marks[0] | marks[1] | marks[2], strong, older, oldest)


def _moved(store: jax.Array, entering: jax.Array, leaves: jax.Array, source: jax.Array) -> jax.Array:
    """`store` with the slots in `leaves` overwritten from `entering`, a chunk of slots at a time and so in place."""
    slots = store.shape[2]
    size = math.gcd(slots, _MOVED)

    def chunk(i: jax.Array, store: jax.Array) -> jax.Array:
        old, out, where = (jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in (store, leaves, source))
        new = jnp.take_along_axis(entering, where[..., None], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(store, jnp.where(out[..., None], new, old), i * size, axis=2)

    return jax.lax.fori_loop(0, slots // size, chunk, store)
