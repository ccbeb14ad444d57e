"""Pruning between layers: what a method says and does, and the names by which methods are known."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from vlcache_jax.pruning.stage import Stage

Project = Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
Count = TypeVar("Count", bound=int | jax.Array)


@dataclasses.dataclass(frozen=True)
class Between:
    """What a method may look at between two layers.

    Attributes:
      stage: the tokens there are; `hidden` is what the last layer that ran gave.
      entered: the same tokens as they entered the layers that ran last.
      prompt: all tokens, as they entered the first layer.
      project: (layer, hidden [batch, n, hidden], positions [batch, n] or [batch, 3, n]) -> the rotated query [batch, n,
        heads, head_dim] and key, and the value [batch, n, kv_heads, head_dim], that a layer makes of hidden states.
        Only what is used of them is computed. At positions of 0 nothing is rotated.
    """

    stage: Stage
    entered: Stage
    prompt: Stage
    project: Project


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """A method: its configuration and its functions. Frozen and hashable, a static argument of the programs.

    Behind some layers a row keeps a part of its visual tokens, those with the best scores, equal ones in their order;
    the others are gone for all later layers. Text stays, and so does the last token of a prompt whatever it is.

    Attributes:
      rooms: padded lengths of the stages behind each of the cuts. None takes the buckets of prompts that hold what the
        batch's rows keep, which needs the batch's numbers: inside `jit`, and for rows of other processes, later stages
        are then as long as the prompt, and nothing is saved. A row that keeps more than its room is an InputError;
        inside `jit` it is not finite.
    """

    rooms: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__

    def cuts(self, layers: int) -> tuple[int, ...]:
        """Behind how many layers of a model with `layers` of them tokens are dropped: rising, from 0 to layers - 1."""
        raise NotImplementedError

    def kept(self, cut: int, visual: Count) -> Count:
        """How many visual tokens a row keeps at cut number `cut`, of the `visual` ones that its prompt had.

        Int in, int out; it must fall with the cuts, or stay, and depends on nothing but the row.
        """
        raise NotImplementedError

    def scores(self, cut: int, between: Between) -> jax.Array:
        """f32 [batch, room]: higher is kept first. Of text and padding it may be anything."""
        raise NotImplementedError


METHODS: dict[str, type[Pruning]] = {}
"""Methods by name; `named` adds to it."""

Method = TypeVar("Method", bound=type[Any])


def named(name: str) -> Callable[[Method], Method]:
    """A class decorator that makes a method known by name, to the command line say."""

    def register(method: Method) -> Method:
        METHODS[name] = method
        return method

    return register
