"""Which tokens a layer keeps: the last ones, the first ones, and the best scores among the rest."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.budgets import Tokens
from vlcache_jax.errors import PolicyError
from vlcache_jax.fractions import floor_fraction
from vlcache_jax.kernels.varying import varying

Count = TypeVar("Count", bound=int | jax.Array)


@dataclasses.dataclass(frozen=True)
class Window:
    """As `Policy.recent`: the latest `count` tokens, unless they would take more than half of the slots.

    With C slots in a layer on average, which depends on the budget and the prompt's length alone, the window has

        min(count, max(C - count, C // 10))

    tokens in every layer and head: `count` of them from C = 2 count on. Below, the best scores get `count` slots first
    and the window has what is left, but a tenth of the slots in any case: the part that VL-Cache's comparison
    (arXiv 2410.23317, section 5) and EffiVLM-Bench give to the window of every method.

    Raises:
      PolicyError: a count below 1.

    Example:
      >>> [Window(32).of(slots) for slots in (27, 40, 64, 256)]
      [2, 8, 32, 32]
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise PolicyError(f"Window({self.count!r}): give a whole number of tokens, at least 1")

    def of(self, slots: Count) -> Count:
        """Tokens of the window where a layer has so many slots on average; int in, int out."""
        count, tenth = self.count, slots // 10
        if isinstance(slots, int):
            return min(count, max(slots - count, tenth))  # type: ignore[return-value]
        return jnp.minimum(count, jnp.maximum(slots - count, tenth))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class AverageShare:
    """As `Policy.recent`: a fraction of the average layer's slots, the same number of tokens in every layer.

    (A plain fraction is one of a layer's own slots.)

    Example:
      >>> AverageShare(0.1).of(57)
      5
    """

    fraction: float

    def __post_init__(self) -> None:
        value = self.fraction
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise PolicyError(f"AverageShare({value!r}) is out of range: give a fraction in [0, 1]")

    def of(self, slots: Count) -> Count:
        """See `Window.of`."""
        return floor_fraction(slots, self.fraction)


Recent = float | Tokens | Window | AverageShare


def settled(recent: Recent, slots: jax.Array) -> float | jax.Array:
    """What `recent` means for prompts whose layers get `slots` slots on average.

    Args:
      recent: as in `Policy`.
      slots: i32 [batch].

    Returns:
      A fraction of a layer's own slots, or a window of i32 [batch] tokens.
    """
    if isinstance(recent, Tokens):
        return jnp.full_like(slots, recent.count)
    return recent.of(slots) if isinstance(recent, Window | AverageShare) else recent


def forced(slots: Count, recent: Recent | jax.Array, sinks: int = 0) -> tuple[Count, Count]:
    """How many of a layer's slots go to the latest and to the first tokens of the prompt, whatever they score.

    latest = max(1, min(window, slots - sinks)) and first = min(sinks, slots - 1), where the window is floor(recent *
    slots) tokens, or a number of them: the last token comes first, then the sinks, then the window. Neither
    number, nor what they leave to the others, ever falls when a slot is added.

    Args:
      slots: of the layer, at least 1; an int or an i32 array [batch, ...].
      recent: as in `Policy`, or as `settled` for the batch. What is not settled takes `slots` for the average.
      sinks: first tokens of the prompt.

    Returns:
      (latest, first), like `slots`.

    Example:
      >>> forced(100, 0.1, sinks=4), forced(5, Tokens(32), sinks=4), forced(2, 0.1, sinks=4)
      ((10, 4), (1, 4), (1, 1))
    """
    window: int | jax.Array
    if isinstance(recent, Window | AverageShare):
        window = recent.of(slots)
    elif isinstance(recent, Tokens):
        window = recent.count
    elif isinstance(recent, int | float):
        window = floor_fraction(slots, recent)
    else:
        window = recent.reshape(recent.shape + (1,) * (jnp.ndim(slots) - recent.ndim))
    if isinstance(slots, int):
        return max(1, min(window, slots - sinks)), min(sinks, slots - 1)  # type: ignore[return-value]
    latest = jnp.maximum(1, jnp.minimum(window, slots - sinks))
    return latest, jnp.minimum(sinks, slots - 1)  # type: ignore[return-value]


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

    numbers = as_unsigned(values)
    threshold = highest(lambda t: count_of(numbers >= t) >= count, (*values.shape[:-1], 1))
    above, equal = numbers > threshold, numbers == threshold
    room = count - count_of(above)
    if ties is not None:
        return above | largest(jnp.where(equal, _finite(ties), -jnp.inf), room)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


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


def unselected(order: jax.Array, lengths: jax.Array) -> jax.Array:
    """What `select` left out of candidates that are the whole prompt, in ascending order.

    Args:
      order: i32 [batch, heads, entries], from `select`.
      lengths: i32 [batch].

    Returns:
      i32, like `order`: first the indices that are not in it, then `entries`.

    Example:
      >>> unselected(jnp.array([[[1, 3, 5, 5, 5]]]), jnp.array([4])).tolist()
      [[[0, 2, 5, 5, 5]]]
    """
    entries = order.shape[-1]
    index = jax.lax.iota(jnp.int32, entries)
    place = jax.vmap(lambda o: jnp.searchsorted(o, index))(order.reshape(-1, entries)).reshape(order.shape)
    found = jnp.take_along_axis(order, jnp.minimum(place, entries - 1), axis=-1) == index[None, None]
    return indices(~found & (index[None, None] < lengths[:, None, None]), entries)


def indices(chosen: jax.Array, size: int) -> jax.Array:
    """Indices of the first `size` marked entries of the last axis, ascending; its length where there are fewer.

    Args:
      chosen: bool [..., entries].
      size: how many.

    Returns:
      i32 [..., size].

    Example:
      >>> indices(jnp.array([True, False, True, False]), 3).tolist()
      [0, 2, 4]
    """
    rank = jnp.cumsum(chosen, axis=-1, dtype=jnp.int32).reshape(-1, chosen.shape[-1])
    wanted = jnp.arange(1, size + 1, dtype=jnp.int32)
    found = jax.vmap(lambda r: jnp.searchsorted(r, wanted))(rank)
    return found.reshape(*chosen.shape[:-1], size).astype(jnp.int32)


def candidates(
    scores: jax.Array,
    lengths: jax.Array,
    recent: Recent | jax.Array,
    count: int,
    sinks: int = 0,
    ties: jax.Array | None = None,
) -> jax.Array:
    """The tokens a layer hands on when it may hand on only `count`; they contain every selection of up to `count`.

    A layer that gets s <= count slots keeps its r(s) latest, its f(s) first and the s - r(s) - f(s) best other tokens
    (`forced`). None of the three falls with s, so those of `count` contain those of s.

    Args:
      scores: f32 [batch, heads, length].
      lengths: i32 [batch].
      recent: as in `forced`.
      count: tokens to hand on, at most length.
      sinks: as in `Policy`.
      ties: as in `select`.

    Returns:
      i32 [batch, heads, count] prompt positions, ascending. For prompts shorter than `count`, padding comes last.
    """
    batch, _, length = scores.shape
    positions = jax.lax.iota(jnp.int32, length)[None, None]
    wanted = jnp.full((batch,), count, jnp.int32)
    latest, first = forced(wanted, recent, sinks)
    return indices(_best(scores, positions, lengths, latest, first, wanted, ties), count)


def select(
    scores: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    ties: jax.Array | None = None,
    *,
    recent: Recent | jax.Array,
    sinks: int = 0,
) -> jax.Array:
    """The tokens a layer keeps, in ascending order.

    Args:
      scores: f32 [batch, heads, entries] of the candidates.
      positions: i32 [batch, heads or 1, entries], their prompt positions, ascending; entries at or beyond the true
        length are padding.
      lengths: i32 [batch].
      slots: i32 [batch], tokens to keep, at most min(entries, length); or [batch, kv_heads], of each head.
      ties: like `scores`, or None: which of two equal scores goes first. The lower position, if these are equal, too.
      recent: as in `forced`.
      sinks: as in `Policy`.

    Returns:
      i32 [batch, heads, entries]: the first `slots` are the indices of the kept entries, ascending; the rest is
        `entries`. heads is kv_heads if each has its own slots.

    Example:
      >>> scores = jnp.array([[[0.5, 0.9, 0.7, 0.0]]])
      >>> select(scores, jnp.arange(4)[None, None], jnp.array([4]), jnp.array([2]), recent=0.1).tolist()
      [[[1, 3, 4, 4]]]
    """
    chosen = _best(scores, positions, lengths, *forced(slots, recent, sinks), slots, ties)
    return indices(chosen, scores.shape[-1])
