"""Arguments of the sparse attention op."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """Who sees whom where tokens do not lie in the order of the prompt. A pytree.

    Attributes:
      places: i32 [batch, kv_heads or heads, length], below 2^24: where a key stands in the prompt.
      limits: i32 like it; a query sees keys that stand before its limit. `places + 1` is causal.
    """

    places: jax.Array
    limits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Lists:
    """Which blocks of keys each block of queries sees. A pytree.

    There is one list for each (row of the batch, list head, block of queries): list heads are the KV heads, whose query
    heads then share a list and the keys that it names, or the query heads. `blocks = ceil(length / rows)` blocks of
    queries, and keys in blocks of `columns`.

    Attributes:
      ids: i32 [batch, kv_heads or heads, blocks, capacity]. The first `counts` of a list are numbers of blocks of keys,
        ascending; what comes behind may be anything. Lists may be shorter than there are blocks of keys.
      counts: i32 [batch, kv_heads or heads, blocks]; 0 gives a block of queries nothing, which is right for padding.
      loose: i32 [batch, kv_heads or heads, n], single columns besides, ascending and each once, that every query behind
        them sees; `length` where there is none. One that lies in a listed block is not counted twice. None: none.
      rows: queries of a block (static).
      columns: keys of a block (static).
      order: of tokens that were moved, with what each sees of its blocks' keys; without loose columns. None: a query
        sees what lies before it, and itself.
    """

    ids: jax.Array
    counts: jax.Array
    loose: jax.Array | None = None
    rows: int = dataclasses.field(default=128, metadata={"static": True})
    columns: int = dataclasses.field(default=128, metadata={"static": True})
    order: Order | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for; static."""

    scale: float
    window: int | None
