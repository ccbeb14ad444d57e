"""MInference (arXiv 2407.02490): each head its own pattern, found once and read from the authors' files."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.files.json_text import parse_json, shorten
from vlcache_jax.files.reading import read_plain
from vlcache_jax.patterns.a_shape import a_shape
from vlcache_jax.patterns.maps import block_means, blocks_of_offsets, united
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs, named
from vlcache_jax.typing import ModelSpec

KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
"""Names of the authors' files: vertical-slash, A-shape, block-sparse."""
DEFAULT = ("vertical_and_slash", 1000, 6096)
"""Of a head that a file does not name."""
_ROWS = 64  # last rows that vertical-slash heads look at
_POOL = 64  # tokens of a mean of block-sparse heads
_BEST = 100  # means of keys that one of queries sees
_FIRST, _NEAREST = 30, 100  # columns, and distances, that vertical-slash heads always have
Head = tuple[str, int, int]


@named("m_inference")
@dataclasses.dataclass(frozen=True)
class MInference(Pattern):
    """Vertical-slash, A-shape or block-sparse, head by head.

    * vertical_and_slash (v, s): with P the attention of the prompt's last 64 rows, the max(v, 30) keys with the largest
      sums over the rows, the first 30 always, and the max(s, 50) distances with the largest sums along the diagonals,
      the smallest 100 always. Keys are single columns; distances are the blocks that they touch, for any query of a
      block: somewhat more than the authors', whose blocks need not begin at a multiple of their size.
    * stream_llm (v, s): `AShape` with v sinks and a window of s.
    * block_sparse: the 100 blocks of 64 keys with the largest products of block means, for each block of 64 queries;
      padding counts as zeros.

    With heads="group" the sums of a KV head's query heads are added before keys and distances are ranked, and the
    largest v and s of the group count. Every vertical-slash head costs n products with single columns, however few of
    them others in its layer want: files with v of many thousands are for prompts of hundreds of thousands of tokens.

    Attributes:
      table: a file of the authors', JSON: a list over layers of {"head": [kind, v, s, score]}; or the same as tuples
        ((kind, v, s), ...) of each layer; None for (1000, 6096) everywhere. A head that is not named has that, too.
      most_columns: room for single columns of a list; None for the largest v.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      InputError: a file that is none, or says something else.
      PolicyError: a value out of range; or, before a prefill, a table of other layers than the model's.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, prefill=vlc.MInference("Qwen2_7B_Instruct_128k.json"))
    """

    table: str | os.PathLike[str] | tuple[tuple[Head, ...], ...] | None = None
    most_columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.table, str | os.PathLike):
            object.__setattr__(self, "table", read_table(self.table))
        if self.table is not None:
            _check_table(self.table)
        is_whole = self.most_columns is None or (isinstance(self.most_columns, int) and self.most_columns >= 0)
        self._require(is_whole, "most_columns", "give a whole number, or None")

    @property
    def _table(self) -> tuple[tuple[Head, ...], ...]:
        assert self.table is None or isinstance(self.table, tuple)
        return self.table or ((DEFAULT,),)

    @property
    def last_rows(self) -> int:
        return _ROWS

    def columns(self, length: int) -> int:
        wanted = max([v for row in self._table for kind, v, _ in row if kind == KINDS[0]], default=0)
        return min(max(wanted, _FIRST) if self.most_columns is None else self.most_columns, length)

    def check(self, spec: ModelSpec) -> None:
        if self.table is not None and len(self._table) != spec.num_layers:
            raise PolicyError(f"MInference: a table of {len(self._table)} layers for a model of {spec.num_layers}")

    def _of_layer(self, inputs: PatternInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(kind, v, s), i32 [heads] each."""
        table = self._table
        rows = [[(KINDS.index(kind), v, s) for kind, v, s in row] for row in table]
        width = max(map(len, rows))
        filler = (0, *DEFAULT[1:])
        numbers = jnp.asarray([[*row, *[filler] * (width + 1 - len(row))] for row in rows], jnp.int32)
        of_layer = numbers[inputs.layer if self.table is not None else 0]
        heads = jnp.minimum(inputs.heads, width)  # the last entry is that of heads without one
        kind, v, s = of_layer[heads].T
        return kind, v, s

    def choose(self, inputs: PatternInputs) -> Chosen:
        kind, v, s = self._of_layer(inputs)
        kinds = {name for row in self._table for name, _, _ in row} | {DEFAULT[0]}
        list_heads = inputs.key.shape[2] if self.heads == "group" else len(inputs.heads)
        is_vertical = kind == 0
        keep, columns, sums = self._vertical_slash(inputs, is_vertical, v, s, list_heads)
        rank = None
        if KINDS[1] in kinds:
            shape = a_shape(inputs, v[:, None, None], s[:, None, None]) & (kind == 1)[:, None, None]
            keep |= united(shape[None], list_heads)
        if KINDS[2] in kinds:
            best = _block_sparse(inputs) & (kind == 2)[None, :, None, None]
            keep |= united(best, list_heads)
        return Chosen(blocks=keep, rank=rank, columns=columns, column_rank=sums)

    def _vertical_slash(
        self, inputs: PatternInputs, mine: jax.Array, v: jax.Array, s: jax.Array, list_heads: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Blocks [batch, list heads, blocks, blocks], single columns [batch, list heads, length] and their sums."""
        last, lengths = inputs.last, inputs.lengths
        assert last is not None

        def of_list(x: jax.Array) -> jax.Array:  # sums over the vertical-slash heads of a list
            x = jnp.where(mine[None, :, None], x, 0)
            return jnp.sum(x.reshape(x.shape[0], list_heads, -1, x.shape[2]), axis=2)

        def most(x: jax.Array, least: int) -> jax.Array:  # i32 [batch, list heads, 1]
            x = jnp.max(jnp.where(mine, jnp.maximum(x, least), 0).reshape(1, list_heads, -1), axis=2)
            return jnp.minimum(x, lengths[:, None])[..., None]

        index = jax.lax.iota(jnp.int32, inputs.length)[None, None]
        inside = index < lengths[:, None, None]
        vertical, slash = of_list(last.vertical), of_list(last.slash)
        vertical = jnp.where(index < _FIRST, jnp.inf, vertical)
        slash = jnp.where(index < _NEAREST, jnp.inf, slash)
        columns = largest(jnp.where(inside, vertical, -jnp.inf), most(v, _FIRST)) & inside
        distances = largest(jnp.where(inside, slash, -jnp.inf), most(s, 50)) & inside
        return blocks_of_offsets(distances, inputs.block), columns, vertical


def _block_sparse(inputs: PatternInputs) -> jax.Array:
    """bool [batch, heads, blocks, blocks]."""
    pool = min(_POOL, inputs.block)
    ratio, heads = inputs.block // pool, len(inputs.heads)
    kv_heads = inputs.key.shape[2]
    q, k = (block_means(x, inputs.lengths, pool, true_counts=False) for x in (inputs.query, inputs.key))
    q = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[3])
    logits = jnp.einsum("btkgd,bskd->bkgts", q, k).reshape(len(inputs.lengths), heads, q.shape[1], k.shape[1])
    row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (2, 3))
    there = -(-inputs.lengths // pool)[:, None, None, None]
    seen = (column <= row) & (column < there)
    best = largest(jnp.where(seen, logits, -jnp.inf), jnp.full((1,) * 4, min(_BEST, k.shape[1]))) & seen
    more = inputs.blocks * ratio - best.shape[2]
    best = jnp.pad(best, ((0, 0), (0, 0), (0, more), (0, more)))
    return jnp.any(best.reshape(*best.shape[:2], inputs.blocks, ratio, inputs.blocks, ratio), axis=(3, 5))


def read_table(path: str | os.PathLike[str]) -> tuple[tuple[Head, ...], ...]:
    """A file of the authors': a JSON list over layers of {"head": [kind, v, s, score]}.

    Raises:
      InputError: no such file, or it says something else.
    """
    try:
        layers = parse_json(read_plain(path))
    except (OSError, ValueError) as error:
        raise InputError(f"the heads' patterns {os.fspath(path)!r} cannot be read: {error}") from error
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise InputError(f"{os.fspath(path)!r} holds no patterns of heads: give a list of objects, one for each layer")
    return tuple(_read_layer(layer, f"{os.fspath(path)!r}, layer {number}") for number, layer in enumerate(layers))


def _read_layer(layer: dict[str, Any], place: str) -> tuple[Head, ...]:
    heads: dict[int, Head] = {}
    for name, entry in layer.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 5):
            raise InputError(f"{place}: {shorten(name)} is no number of a head")
        if not isinstance(entry, list) or len(entry) < 3 or entry[0] not in KINDS:
            raise InputError(f"{place}, head {name}: {shorten(entry)} is none of {', '.join(KINDS)} with two numbers")
        if any(isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < 2**31 for x in entry[1:3]):
            raise InputError(f"{place}, head {name}: {shorten(entry)}: give two whole numbers")
        heads[int(name)] = (entry[0], entry[1], entry[2])
    return tuple(heads.get(head, DEFAULT) for head in range(max(heads, default=-1) + 1))


def _check_table(table: Any) -> None:
    def is_head(x: Any) -> bool:
        whole = isinstance(x, tuple) and len(x) == 3 and all(isinstance(n, int) and n >= 0 for n in x[1:])
        return whole and x[0] in KINDS

    rows = table if isinstance(table, tuple) and table else [None]
    if not all(isinstance(row, tuple) and all(map(is_head, row)) for row in rows):
        kinds = ", ".join(KINDS)
        raise PolicyError(
            f"MInference(table={shorten(str(table))}): give ((kind, v, s), ...) of each layer, kind one of {kinds}"
        )
