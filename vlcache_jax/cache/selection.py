"""Which tokens a layer keeps: the last ones, the first ones, and the best scores among the rest.

All of it is local to a row and a head: on a mesh no device needs another one's scores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import local, split_axes

_AT_ONCE = 2**23  # scores ranked at once, of as many layers as that is


def protected_first(
    scores: jax.Array, lengths: jax.Array, protected: jax.Array, ties: jax.Array | None = None
) -> jax.Array:
    """Scores that rank all protected tokens before all others, and each kind among itself as before.

    The new scores are whole numbers (ranks), so nothing is lost to rounding as it would be by adding a large number.

    Args:
      scores: f32 [batch, heads, length].
      lengths: i32 [batch].
      protected: bool [batch, length].
      ties: like `scores`, or None: which of two equal scores goes first. The lower position, if these are equal, too.

    Returns:
      f32 [batch, heads, length], no two of a head alike below 2 ** 24 tokens.

    Example:
      >>> scores = jnp.array([[[0.5, 0.9, 0.7, 0.0]]])
      >>> protected_first(scores, jnp.array([4]), jnp.array([[True, False, False, True]])).tolist()
      [[[3.0, 1.0, 0.0, 2.0]]]
    """
    length = scores.shape[-1]
    valid = jax.lax.iota(jnp.int32, length)[None] < lengths[:, None]
    class_ = jnp.where(valid, jnp.where(protected, 0, 1), 2)[:, None]
    index = jnp.broadcast_to(jax.lax.iota(jnp.int32, length), scores.shape)
    ranked = [scores] if ties is None else [scores, ties]
    keys = (jnp.broadcast_to(class_, scores.shape), *(-_finite(x) for x in ranked), index)
    order = jax.lax.sort(keys, num_keys=len(keys) - 1, is_stable=True)[-1]
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return (lengths[:, None, None] - 1 - rank).astype(jnp.float32)


def _finite(scores: jax.Array) -> jax.Array:
    return jnp.nan_to_num(scores.astype(jnp.float32), nan=jnp.finfo(jnp.float32).min)


def _best(
    scores: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    latest: jax.Array,
    first: jax.Array,
    count: jax.Array,
    ties: jax.Array | None,
) -> jax.Array:
    """Marks the `count` best entries: forced ones, then by falling score, then `ties`, then the lower index.

    Padding comes last. A score that is infinite or not a number never overrides that order: NaN ranks like -inf,
    behind all finite ones.

    scores and ties f32 [batch, heads, entries], positions i32 [batch, heads or 1, entries] ascending, lengths i32
    [batch], latest, first and count i32 [batch] or [batch, kv_heads] -> bool [batch, heads or kv_heads, entries].
    """
    end, latest, first, count = (x.reshape(len(x), -1, 1) for x in (lengths, latest, first, count))
    priority = jnp.where((positions >= end - latest) | (positions < first), jnp.inf, _finite(scores))
    return largest(jnp.where(positions < end, priority, -jnp.inf), count, ties)


def largest(values: jax.Array, count: jax.Array, ties: jax.Array | None = None) -> jax.Array:
    """Marks the `count` largest values of the last axis; of equal ones those with the larger `ties`, then lower index.

    Two to three times as fast as a sort on a CPU (2,048 values), and far quicker to compile for TPUs than a sort.
    """

    def count_of(marks: jax.Array) -> jax.Array:
        return jnp.sum(marks, axis=-1, keepdims=True, dtype=jnp.int32)

    numbers = _computed_once(as_unsigned(values))
    threshold = highest(lambda t: count_of(numbers >= t) >= count, (*values.shape[:-1], 1))
    above, equal = numbers > threshold, numbers == threshold
    room = count - count_of(above)
    if ties is not None:
        return above | largest(jnp.where(equal, _finite(ties), -jnp.inf), room)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


def _computed_once(numbers: jax.Array) -> jax.Array:
    """Numbers above 0 as they are, u32: all who read them read the same bits.

    Where the scores' formula ends in two fusions, a CPU's compiler may round it differently in each, and what the
    search has found would be equal to nothing. It drops barriers before it fuses; a loop that it cannot know to be
    never entered is one.
    """
    first = numbers.ravel()[0]
    return jax.lax.fori_loop(0, (first == 0).astype(jnp.int32), lambda _, x: x + 1, numbers)


def as_unsigned(values: jax.Array) -> jax.Array:
    """u32 numbers ordered like the f32 values, -inf included, all above 0; 0.0 and -0.0 are equal.

    Example:
      >>> numbers = as_unsigned(jnp.array([-jnp.inf, -1.0, -0.0, 0.0, 2.0]))
      >>> jnp.diff(numbers.astype(jnp.float32)).astype(bool).tolist()
      [True, True, False, True]
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)
    ordered = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))
    return jax.lax.bitcast_convert_type(ordered, jnp.uint32)


def highest(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The largest number for which something holds that also holds for every smaller one: found bit by bit.

    Args:
      holds: u32 of `shape` -> bool of `shape`, called 32 times.
      shape: of the numbers sought.

    Returns:
      u32 of `shape`; 0 where it holds for no number above 0.

    Example:
      >>> highest(lambda number: number // 7 <= 5, ()).item()
      41
    """

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        larger = found | (jnp.uint32(1) << jnp.asarray(31 - i, jnp.uint32))
        return jnp.where(holds(larger), larger, found)

    found = jnp.zeros(shape, jnp.uint32)
    return jax.lax.fori_loop(0, 32, step, varying(found, holds(found)))  # of which only the type is needed


def indices(chosen: jax.Array, size: int) -> jax.Array:
    """Indices of the first `size` marked entries of the last axis, ascending; its length where there are fewer.

    One sort: faster on CPUs than a binary search, which on a TPU would gather number by number.

    Args:
      chosen: bool [..., entries].
      size: how many, at most entries.

    Returns:
      i32 [..., size].

    Example:
      >>> indices(jnp.array([True, False, True, False]), 3).tolist()
      [0, 2, 4]
    """
    index = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, chosen.ndim - 1)
    return jax.lax.sort(jnp.where(chosen, index, chosen.shape[-1]), is_stable=False)[..., :size]


def candidates(
    scores: jax.Array,
    lengths: jax.Array,
    count: int,
    latest: jax.Array,
    first: jax.Array,
    ties: jax.Array | None = None,
) -> jax.Array:
    """The tokens a layer hands on when it may hand on only `count`; they contain every selection of up to `count`.

    A layer that gets s <= count slots keeps its r(s) latest, its f(s) first and the s - r(s) - f(s) best other tokens
    (`policies.window.forced`). None of the three falls with s, so those of `count` contain those of s.

    Args:
      scores: f32 [batch, heads, length].
      lengths: i32 [batch].
      count: tokens to hand on, at most length.
      latest: i32 [batch], how many of them are the prompt's last tokens.
      first: i32 [batch], its first ones.
      ties: as in `select_layers`.

    Returns:
      i32 [batch, heads, count] prompt positions, ascending. For prompts shorter than `count`, padding comes last.
    """

    def run(scores, lengths, latest, first, ties):
        positions = jax.lax.iota(jnp.int32, scores.shape[-1])[None, None]
        return indices(_best(scores, positions, lengths, latest, first, jnp.full_like(lengths, count), ties), count)

    rows, heads = split_axes(*scores.shape[:2])
    split, row = PartitionSpec(rows, heads), PartitionSpec(rows)
    inputs = (split, row, row, row, None if ties is None else split)
    return local(run, inputs, split)(scores, lengths, latest, first, ties)


def select_layers(
    scores: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    latest: jax.Array,
    first: jax.Array,
    ties: jax.Array | None = None,
    *,
    rest: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The tokens that layers keep, in ascending order; each device for its rows and heads.

    Args:
      scores: f32 [layers, batch, heads, entries] of the candidates.
      positions: i32 [layers, batch, heads or 1, entries], their prompt positions, ascending; entries at or beyond the
        true length are padding.
      lengths: i32 [batch].
      slots: i32 [layers, batch], tokens to keep, at most min(entries, length); or [layers, batch, kv_heads], of each
        head.
      latest: like `slots`, how many of them go to the prompt's last tokens whatever they score.
      first: like `slots`, to its first ones.
      ties: like `scores`, or None: which of two equal scores goes first. The lower position, if these are equal, too.
      rest: whether those left out are wanted, too.

    Returns:
      (order, others): i32 [layers, batch, heads, entries]: the first `slots` are the indices of the kept entries,
        ascending; the rest is `entries`. heads is kv_heads if each has its own slots. And those of the prompt that are
        not kept, in the same form, or None.

    Example:
      >>> scores = jnp.array([[[[0.5, 0.9, 0.7, 0.0]]]])
      >>> one, none = jnp.array([[1]]), jnp.array([[0]])
      >>> select_layers(scores, jnp.arange(4)[None, None, None], jnp.array([4]), 2 * one, one, none)[0].tolist()
      [[[[1, 3, 4, 4]]]]
    """

    layers = scores.shape[0]

    def run(lengths: jax.Array, *stacked: Any) -> tuple[jax.Array, jax.Array | None]:
        def one(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
            scores, positions, slots, latest, first, ties = layer
            chosen = _best(scores, positions, lengths, latest, first, slots, ties)
            others = indices(~chosen & (positions < lengths[:, None, None]), chosen.shape[-1]) if rest else None
            return indices(chosen, chosen.shape[-1]), others

        size = stacked[0].size // layers  # on this device
        return jax.lax.map(one, stacked, batch_size=max(1, _AT_ONCE // size))

    rows, heads = split_axes(scores.shape[1], max(scores.shape[2], 1 if slots.ndim < 3 else slots.shape[2]))

    def place(x: jax.Array | None) -> PartitionSpec | None:
        if x is None:
            return None
        return PartitionSpec(None, rows, heads) if x.ndim > 2 and x.shape[2] > 1 else PartitionSpec(None, rows)

    stacked = scores, positions, slots, latest, first, ties
    split = PartitionSpec(None, rows, heads)
    outputs: Any = (split, split if rest else None)
    return local(run, (PartitionSpec(rows), *map(place, stacked)), outputs)(lengths, *stacked)
