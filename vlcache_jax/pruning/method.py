"""Pruning in front of layers: what a method says and does, and the names by which methods are known."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax

from vlcache_jax.cache.fractions import floor_fraction
from vlcache_jax.pruning.options import check_part
from vlcache_jax.pruning.stage import Choice, Stage
from vlcache_jax.typing import TowerView

Project = Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
Count = TypeVar("Count", bound=int | jax.Array)
Places = Any
"""`numpy` or `jax.numpy` arrays: what comes out is of the kind of what went in."""


@dataclasses.dataclass(frozen=True)
class Between:
    """What a method may look at where it drops tokens.

    Attributes:
      stage: the tokens there are; `hidden` is what the last layer that ran gave, or the embeddings if none has run.
      entered: the same tokens as they entered the last layer that ran, for a method that `looks_back`; else as they
        entered the first of the layers that ran since the last cut.
      prompt: all tokens, as they entered the first layer.
      project: (layer, hidden [batch, n, hidden], positions [batch, n] or [batch, 3, n]) -> the rotated query [batch, n,
        heads, head_dim] and key, and the value [batch, n, kv_heads, head_dim], that a layer makes of hidden states.
        Only what is used of them is computed. At positions of 0 nothing is rotated.
      tower: what the vision tower says of the prompt's tokens, for a method that `needs_tower`; else None.
      project_features: `TowerView.features` -> embeddings [batch, n, hidden], what the model's projector makes of them.
      watched: what `Pruning.watch` made of the last layer's neurons, for a method that `watches`.
    """

    stage: Stage
    entered: Stage
    prompt: Stage
    project: Project
    tower: TowerView | None = None
    project_features: Callable[[jax.Array], jax.Array] | None = None
    watched: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """A method: its configuration and its functions. Frozen and hashable, a static argument of the programs.

    Behind some layers, or in front of the first, a row keeps a part of its visual tokens, those with the best scores,
    equal ones in their order; the others are gone for all later layers. Text stays, and so does the last token of a
    prompt whatever it is.

    A method has `cuts`, `kept`, and `scores` or `choose`.

    Attributes:
      rooms: padded lengths of the stages behind each of the cuts. None takes the buckets of prompts that hold what the
        batch's rows keep, which needs the batch's numbers: inside `jit`, and for rows of other processes, later stages
        are then as long as the prompt, and nothing is saved. A row that keeps more than its room is an InputError;
        inside `jit` it is not finite.
      looks_back: whether it wants `Between.entered` of the last layer that ran (of the class).
      needs_tower: whether it wants `Between.tower`, and so cuts at 0 only (of the class).
      watches: whether it wants `Between.watched`; such a method `looks_back`, too (of the class).
    """

    rooms: tuple[int, ...] | None = None
    looks_back: ClassVar[bool] = False
    needs_tower: ClassVar[bool] = False
    watches: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__

    def of_model(self, layers: int) -> "Pruning":
        """The method for a model of so many layers, on which options may depend; others are asked of it."""
        del layers
        return self

    def cuts(self, layers: int) -> tuple[int, ...]:
        """Behind how many layers of a model with `layers` of them tokens are dropped: rising, from 0 to layers - 1."""
        raise NotImplementedError

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        """How many visual tokens a row keeps at cut number `cut`, not counting those that are `protected`.

        Int in, int out. It depends on nothing but the row, and must not fall where `left` rises.

        Args:
          cut: number of the cut, from 0.
          visual: how many visual tokens the prompt had.
          left: how many there still are. Where rooms are chosen, the most there can be.
        """
        raise NotImplementedError

    def protected(self, cut: int, grid: Places) -> Places | None:
        """Tokens that stay besides the best ones, bool [batch, room]; None for none.

        Args:
          cut: number of the cut.
          grid: i32 [batch, 3, room], tile or frame of visual tokens, row and column in it, -1 of others; of NumPy where
            rooms are chosen.
        """
        del cut, grid
        return None

    def watch(self, stage: Stage, neurons: jax.Array) -> Any:
        """What a method that `watches` wants of the neurons of the last layer that ran: called within it.

        Args:
          stage: the tokens.
          neurons: [batch, room, intermediate size], what the last product of its MLP is made of.

        Returns:
          A pytree of arrays, far smaller, please.
        """
        raise NotImplementedError

    def choose(self, cut: int, between: Between) -> Choice:
        """What stays, and what becomes of it; by default the best `scores`."""
        return Choice(self.scores(cut, between))

    def scores(self, cut: int, between: Between) -> jax.Array:
        """f32 [batch, room]: higher is kept first. Of text and padding it may be anything."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InFront(Pruning):
    """A method that drops tokens once, in front of the decoder: floor(keep N) of a prompt's N visual tokens stay."""

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_part(self.name, keep=self.keep)

    def cuts(self, layers: int) -> tuple[int, ...]:
        return (0,) if self.keep < 1 else ()

    def kept(self, cut: int, visual: Count, left: Count) -> Count:
        return floor_fraction(visual, self.keep)


METHODS: dict[str, type[Pruning]] = {}
"""Methods by name; `named` adds to it."""

Method = TypeVar("Method", bound=type[Any])


def named(name: str) -> Callable[[Method], Method]:
    """A class decorator that makes a method known by name, to the command line say."""

    def register(method: Method) -> Method:
        METHODS[name] = method
        return method

    return register
