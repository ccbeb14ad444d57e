"""Sparse prefill: what a pattern says and does, and the names by which patterns are known."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError, is_whole
from vlcache_jax.patterns.last_rows import LastRowsAttention, last_rows_attention
from vlcache_jax.typing import ModelSpec

MIN_TOKENS = 16384
"""Shorter prompts are dense by default: below, estimates and lists cost about what they save."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternInputs:
    """What a pattern may look at, in one layer of the prefill. On a mesh, a device has its own rows and heads only.

    Attributes:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      lengths: i32 [batch]; what lies behind them is padding, which may hold anything finite.
      vision: bool [batch, length], which tokens are visual.
      layer: i32 [], number of the layer.
      heads: i32 [heads], numbers of the query heads in the model.
      grid: i32 [batch, 2], tokens from one row of an image to the next, and from one frame, tile or image to the next,
        0 where there is none; None where the model does not tell.
      block: queries, and keys, of a block.
      last: what the prompt's last `Pattern.last_rows` rows attend to; None where the pattern asks for none.
    """

    query: jax.Array
    key: jax.Array
    lengths: jax.Array
    vision: jax.Array
    layer: jax.Array
    heads: jax.Array
    grid: jax.Array | None
    block: int
    last: LastRowsAttention | None = None

    @property
    def length(self) -> int:
        """Padded length."""
        return self.query.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of a padded prompt."""
        return -(-self.length // self.block)

    @property
    def valid(self) -> jax.Array:
        """bool [batch, length]: False where there is padding."""
        return jax.lax.iota(jnp.int32, self.length)[None] < self.lengths[:, None]

    @property
    def distance(self) -> jax.Array:
        """i32 [blocks, blocks]: how many blocks a block of keys lies before one of queries."""
        index = jax.lax.iota(jnp.int32, self.blocks)
        return index[:, None] - index[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """What a pattern chose among tokens in an order of its own, in which blocks hold what belongs together.

    Attributes:
      order: i32 [batch, list heads, length], the token that comes to each place; padding last. List heads are the KV
        heads, or the query heads with `Pattern.heads` of "each".
      back: i32 like it, the place that each token comes to.
      limits: i32 [batch, length], of each token: of these blocks it sees keys before this token of the prompt. Keys
        that `Chosen.blocks` names must lie behind it.
      blocks: bool [batch, list heads, blocks, blocks], (queries, keys) in that order. Those without a key before the
        limit of one of the queries are left out whatever is said of them.
    """

    order: jax.Array
    back: jax.Array
    limits: jax.Array
    blocks: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a pattern chose. Blocks behind the queries, and padding, are left out whatever is said of them.

    Attributes:
      blocks: bool [batch or 1, heads or kv_heads or 1, blocks, blocks], (queries, keys). A block of queries always sees
        its own keys.
      rank: f32 like it, which ones to keep where a list holds fewer; the nearest by default.
      columns: bool [batch, heads or kv_heads, length], single keys that all queries behind them see besides; or None.
      column_rank: f32 like it.
      moved: blocks of moved tokens besides, or None.
    """

    blocks: jax.Array
    rank: jax.Array | None = None
    columns: jax.Array | None = None
    column_rank: jax.Array | None = None
    moved: Moved | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """A pattern: its configuration and its functions. Frozen and hashable, a static argument of the programs.

    Attributes:
      heads: "group" gives the query heads of a KV head one list, of what any of them wants: its keys are read once for
        all. "each" gives each query head its own.
      capacity: which part of a prompt's blocks of keys a list can hold. Where a block of queries wants more, the
        best ones are kept, and `report.prefill.overflow` counts the others. Time follows what is listed, not this.
      min_tokens: prompts padded to fewer tokens are dense.
      dense_layers: numbers of layers that are dense whatever the length.
      block: queries and keys of a block. A TPU's kernel needs a multiple of 128.
      needs_whole_images: why it wants all tokens of an image, so that it cannot go with pruning; None if it does not
        (of the class).

    Raises:
      PolicyError: a value out of range.
    """

    heads: str = "group"
    capacity: float = 1.0
    min_tokens: int = MIN_TOKENS
    dense_layers: tuple[int, ...] = ()
    block: int = 128
    needs_whole_images: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self._require(self.heads in ("group", "each"), "heads", "use 'group' or 'each'")
        is_share = isinstance(self.capacity, int | float) and 0 < self.capacity <= 1
        self._require(is_share, "capacity", "give a share of the blocks, above 0 and up to 1")
        self._require_whole(min_tokens=0, block=1)
        layers = self.dense_layers
        are_layers = isinstance(layers, tuple) and all(isinstance(x, int) and x >= 0 for x in layers)
        self._require(are_layers, "dense_layers", "give numbers of layers, from 0 on")

    def _require_whole(self, **least: int) -> None:
        for name, low in least.items():
            self._require(is_whole(getattr(self, name), low), name, f"give a whole number of at least {low}")

    def _require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise PolicyError(f"{self.name}({name}={getattr(self, name)!r}): {remedy}")

    @property
    def name(self) -> str:
        """For messages and reports."""
        return type(self).__name__

    @property
    def last_rows(self) -> int:
        """How many of the prompt's last rows the pattern wants the attention of; 0 for none."""
        return 0

    def columns(self, length: int) -> int:
        """How many single columns a list may have, of prompts padded to `length` tokens; 0 for none."""
        del length
        return 0

    def most_blocks(self, blocks: int) -> int:
        """Blocks of keys, of `blocks`, that a list holds at most: a bound that the pattern itself knows.

        Not of the lists of moved tokens.
        """
        return blocks

    def check(self, spec: ModelSpec) -> None:
        """Raises PolicyError if the pattern does not fit a model."""
        del spec

    def choose(self, inputs: PatternInputs) -> Chosen:
        """The blocks, and single columns, of a layer."""
        raise NotImplementedError


PATTERNS: dict[str, type[Pattern]] = {}
"""Patterns by name; `named` adds to it."""

Class = TypeVar("Class", bound=type[Any])


def named(name: str) -> Callable[[Class], Class]:
    """A class decorator that makes a pattern known by name, to the command line say."""

    def register(pattern: Class) -> Class:
        PATTERNS[name] = pattern
        return pattern

    return register


def with_last_rows(pattern: Pattern, inputs: PatternInputs) -> PatternInputs:
    """The inputs with `last`, where the pattern asks for it."""
    if not pattern.last_rows:
        return inputs
    last = last_rows_attention(inputs.query, inputs.key, inputs.lengths, pattern.last_rows)
    return dataclasses.replace(inputs, last=last)
