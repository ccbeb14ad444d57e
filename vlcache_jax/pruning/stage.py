"""What lies between two ranges of layers, and how tokens are dropped from it.

prompt   <s> USER : i0 i1 i2 i3 i4 i5 What ? .        layers 0 .. 7
stage    <s> USER : i0    i2       i5 What ? .        layers 8 .. 15     index 0 1 2 3 5 8 9 10 11
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import indices, largest
from vlcache_jax.inputs import TEXT
from vlcache_jax.kernels.attention import Mask
from vlcache_jax.parallel.mesh import by_row
from vlcache_jax.typing import Embedded


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a pruning method wants of a stage.

    Attributes:
      scores: f32 [batch, room]: higher is kept first, of equal ones the first token, and one that is NaN comes last.
      count: i32 [batch], how many of the `droppable` tokens stay, at most as many as the method's `kept` says; None for
        as many as that.
      hidden: what becomes of the tokens where those that go are merged into those that stay, like `Stage.hidden`; None:
        they stay as they are.
    """

    scores: jax.Array
    count: jax.Array | None = None
    hidden: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """The tokens of every prompt that some layers run on, in their order. A pytree.

    Attributes:
      hidden: [batch, room, hidden], as it enters the first of the layers.
      positions: i32 [batch, room] or [batch, 3, room], rotary positions: those of the prompt.
      lengths: i32 [batch], tokens of each row; the rest is padding.
      vision_index: i32 [batch, room], as in `Batch`.
      index: i32 [batch, room], rising: the place in the prompt of each token. None: nothing was dropped.
      blocks: as in `Embedded`, i32 [batch, room]; or None.
      layer_inputs: as in `Embedded`, [n, batch, room, hidden]; or None.
      grid: i32 [batch, 3, room], tile or frame of visual tokens, row and column in it, -1 of others; None: not known.
      said: i32 [batch], the tokens of each row's prompt, where a policy has it said twice (`repeated`); None: once.
      layers: the first layer, and the one before which they end (static).
    """

    hidden: jax.Array
    positions: jax.Array
    lengths: jax.Array
    vision_index: jax.Array
    index: jax.Array | None = None
    blocks: jax.Array | None = None
    layer_inputs: jax.Array | None = None
    grid: jax.Array | None = None
    said: jax.Array | None = None
    layers: tuple[int, int] = dataclasses.field(default=(0, 0), metadata={"static": True})

    @classmethod
    def of_prompt(
        cls,
        embedded: Embedded,
        lengths: jax.Array,
        vision_index: jax.Array,
        layers: int,
        grid: jax.Array | None = None,
    ) -> "Stage":
        """Whole prompts, for the first `layers` layers."""
        return cls(
            embedded.hidden,
            embedded.positions,
            lengths,
            vision_index,
            blocks=embedded.blocks,
            layer_inputs=embedded.layer_inputs,
            grid=grid,
            layers=(0, layers),
        )

    def repeated(self, next_position: jax.Array) -> "Stage":
        """Every prompt with itself behind it, as a text that goes on at `next_position` i32 [batch]."""
        room, n = self.room, self.lengths[:, None]
        place = jax.lax.iota(jnp.int32, 2 * room)[None]
        again, inside = place >= n, place < 2 * n
        order = jnp.where(again, jnp.clip(place - n, 0, n - 1), place)
        hidden, positions = self.tokens(order)
        ahead = jnp.where(again, next_position[:, None], 0)
        ahead = jnp.expand_dims(ahead, range(1, positions.ndim - 1))
        blocks, more = self.blocks, self.layer_inputs
        if blocks is not None:  # an image and its repetition do not see each other
            blocks = _at(blocks, order)
            blocks = jnp.where(inside, jnp.where(again & (blocks >= 0), blocks + room, blocks), -1)
        return dataclasses.replace(
            self,
            hidden=hidden,
            positions=positions + ahead,
            lengths=2 * self.lengths,
            vision_index=jnp.where(inside, _at(self.vision_index, order), TEXT),
            blocks=blocks,
            layer_inputs=None if more is None else jnp.take_along_axis(more, order[None, ..., None], axis=2),
            grid=None,
            said=self.lengths,
        )

    def once(self) -> "Stage":
        """The prompts as they were before they were `repeated`."""
        if self.said is None:
            return self
        room, more = self.room // 2, self.layer_inputs
        return dataclasses.replace(
            self,
            hidden=self.hidden[:, :room],
            positions=self.positions[..., :room],
            lengths=self.said,
            vision_index=jnp.where(_below(self.said, room), self.vision_index[:, :room], TEXT),
            blocks=None if self.blocks is None else jnp.where(_below(self.said, room), self.blocks[:, :room], -1),
            layer_inputs=None if more is None else more[:, :, :room],
            said=None,
        )

    @property
    def room(self) -> int:
        """Padded length."""
        return self.hidden.shape[1]

    @property
    def size(self) -> int:
        """Layers."""
        return self.layers[1] - self.layers[0]

    @property
    def mask(self) -> Mask:
        """Which tokens see each other."""
        return Mask(blocks=self.blocks)

    @property
    def valid(self) -> jax.Array:
        """bool [batch, room]: False where there is padding."""
        return _below(self.lengths, self.room)

    @property
    def vision_mask(self) -> jax.Array:
        """bool [batch, room]: True where the token is visual."""
        return self.vision_index != TEXT

    @property
    def droppable(self) -> jax.Array:
        """bool [batch, room]: the visual tokens, but for a row's last token, which its answer goes on from."""
        last = jax.lax.iota(jnp.int32, self.room)[None] == self.lengths[:, None] - 1
        return self.vision_mask & self.valid & ~last

    @property
    def places(self) -> jax.Array:
        """i32 [batch, room]: the place of each token in its prompt; -1 in padding."""
        index = jax.lax.iota(jnp.int32, self.room)[None] if self.index is None else self.index
        return jnp.where(self.valid, index, -1)

    def tokens(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states and rotary positions of the tokens at `index` i32 [batch, n]."""
        return jnp.take_along_axis(self.hidden, index[..., None], axis=1), _at(self.positions, index)

    def dropping(
        self, choice: Choice, count: jax.Array, protected: jax.Array | None, room: int, layers: int
    ) -> "Stage":
        """The stage of the next `layers` layers: text, and the visual tokens that were chosen.

        Args:
          choice: what a method wants.
          count: i32 [batch], how many of the `droppable` tokens stay for their scores.
          protected: bool [batch, room], tokens that stay, too; None for none.
          room: the new padded length. A row that keeps more tokens has hidden states of NaN from here on.
        """

        def of_rows(
            stage: Stage, scores: jax.Array, count: jax.Array, protected: jax.Array | None
        ) -> tuple[Stage, jax.Array]:
            may_go = stage.droppable
            scores = jnp.nan_to_num(scores.astype(jnp.float32), nan=jnp.finfo(jnp.float32).min)
            best = largest(jnp.where(may_go, scores, -jnp.inf), count[:, None])
            if protected is not None:
                best |= protected
            stays = stage.valid & (best | ~may_go)
            total = jnp.sum(stays, axis=1, dtype=jnp.int32)
            # Behind the end the last token is repeated: positions are not beyond its own.
            order = jnp.minimum(indices(stays, room), stage.lengths[:, None] - 1)
            hidden, positions = stage.tokens(order)
            lengths = jnp.minimum(total, room)
            inside = jax.lax.iota(jnp.int32, room)[None] < lengths[:, None]
            index = order if stage.index is None else _at(stage.index, order)
            new = dataclasses.replace(
                stage,
                hidden=jnp.where((total <= room)[:, None, None], hidden, jnp.nan),
                positions=positions,
                lengths=lengths,
                vision_index=jnp.where(inside, _at(stage.vision_index, order), TEXT),
                index=index,
                blocks=None if stage.blocks is None else jnp.where(inside, _at(stage.blocks, order), -1),
                grid=None if stage.grid is None else jnp.where(inside[:, None], _at(stage.grid, order), -1),
            )
            return new, order

        hidden = self.hidden if choice.hidden is None else choice.hidden
        plain = dataclasses.replace(self, hidden=hidden, layer_inputs=None)  # whose first axis is not the rows
        new, order = by_row(of_rows, len(self.lengths))(plain, choice.scores, count, protected)
        more, end = self.layer_inputs, self.layers[1]
        if more is not None:
            more = None if end >= len(more) else jnp.take_along_axis(more, order[None, ..., None], axis=2)
        return dataclasses.replace(new, layer_inputs=more, layers=(end, end + layers))


def joined(of_stages: Sequence[Any]) -> Any:
    """Pytrees of arrays, each stacked over a stage's layers, as one over all layers."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *of_stages) if len(of_stages) > 1 else of_stages[0]


def _below(lengths: jax.Array, room: int) -> jax.Array:
    """bool [batch, room]: the first `lengths` of each row."""
    return jax.lax.iota(jnp.int32, room)[None] < lengths[:, None]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """[batch, ..., length] at i32 [batch, n]: [batch, ..., n]."""
    index = jnp.expand_dims(index, range(1, x.ndim - 1))
    return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:-1], index.shape[-1])), axis=-1)
