"""MMInference (ICML 2025, arXiv 2504.16083): tokens moved so that what looks at each other on a grid is a block."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.patterns.a_shape import a_shape
from vlcache_jax.patterns.last_rows import last_rows_attention
from vlcache_jax.patterns.pattern import Chosen, Moved, Pattern, PatternInputs, named

_ROWS = 64


@named("mm_inference")
@dataclasses.dataclass(frozen=True)
class MMInference(Pattern):
    """Visual queries see text, a grid of visual keys, and what lies near; text queries everything before them.

    A token's phase is its distance from the prompt's first visual token, modulo a stride: the tokens from one row of an
    image to the next, or from one frame, tile or image to the next. With P the attention of 64 rows, each head takes
    the stride r for which

        line = max over phases p of    sum of P over visual keys of phase p

    is larger. Then tokens are moved, text in front and visual tokens phase by phase (one for each column of the images,
    or each place in a frame), which makes blocks of

        text queries    all keys
        visual queries  text; the phase of the line; their own phase

    so that neither text between frames nor a stride leaves blocks of which little is wanted. Besides, in the order of
    the prompt, a block of queries sees those of the `window` tokens before each. Whole blocks throughout: a block of
    moved queries sees a block of keys that holds a key of a phase of one of its queries.

    No code of the paper is public. It searches strides, and the kind of each head, offline; here strides are the
    model's own, and every head is of this kind.

    Attributes:
      window: tokens before a query.
      boundary: "query": the 64 rows are the last visual ones, since visual and text queries differ; "none": the last
        ones of the prompt.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`. Both parts of a list have that capacity.

    Raises:
      PolicyError: a value out of range; or, in a prefill, a model that does not tell where its visual tokens lie.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.MMInference())
    """

    window: int = 1024
    boundary: str = "query"
    needs_whole_images: ClassVar[str | None] = "it counts the tokens from one row of an image to the next"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole(window=1)
        self._require(self.boundary in ("query", "none"), "boundary", "use 'query' or 'none'")

    def _reach(self, block: int) -> int:
        """So many blocks before a block of queries hold what is near."""
        return (self.window + block - 2) // block

    def most_blocks(self, blocks: int) -> int:
        return min(blocks, self._reach(self.block) + 1)

    def choose(self, inputs: PatternInputs) -> Chosen:
        if inputs.grid is None:
            raise PolicyError("MMInference: this model does not tell where its visual tokens lie: use another pattern")
        length, block = inputs.length, inputs.block
        visual = inputs.vision & inputs.valid
        index = jax.lax.iota(jnp.int32, length)[None]
        end = jnp.max(jnp.where(visual, index, -1), axis=1) + 1
        rows_end = jnp.where(end > 0, end, inputs.lengths) if self.boundary == "query" else inputs.lengths
        received = last_rows_attention(inputs.query, inputs.key, rows_end, _ROWS).vertical
        received = _united_sums(received, inputs.key.shape[2] if self.heads == "group" else len(inputs.heads))
        first = jnp.argmax(visual, axis=1).astype(jnp.int32)[:, None, None]
        stride = jnp.where(inputs.grid > 0, inputs.grid, length)[..., None]
        phase = jnp.where(visual[:, None], (index[None] - first) % stride, length)  # [batch, strides, length]
        sums = jnp.stack([_by_phase(received, phase[:, i]) for i in range(2)])  # [strides, batch, list heads, length]
        by_frame = jnp.max(sums[1], axis=2) > jnp.max(sums[0], axis=2)
        line = jnp.argmax(jnp.where(by_frame[..., None], sums[1], sums[0]), axis=2).astype(jnp.int32)[..., None]

        kind = jnp.where(visual[:, None], 1 + phase, 0)  # text is 0, padding comes last
        kind = jnp.where(inputs.valid[:, None], kind, length + 1)
        order = jnp.argsort(kind, axis=2, stable=True).astype(jnp.int32)
        back = jnp.argsort(order, axis=2).astype(jnp.int32)
        kinds = jnp.take_along_axis(kind, order, axis=2)
        of_head = by_frame.astype(jnp.int32)[..., None]  # [batch, list heads, 1]
        order, back, kinds = (jnp.take_along_axis(x, of_head, axis=1) for x in (order, back, kinds))

        def count(which: jax.Array) -> jax.Array:  # [batch, list heads, 1, 1]
            return jnp.sum(which, axis=2, dtype=jnp.int32)[..., None, None]

        new = jnp.concatenate([jnp.ones_like(kinds[..., :1], bool), kinds[..., 1:] != kinds[..., :-1]], axis=2)
        begin = jax.lax.cummax(jnp.where(new, index[None], 0), axis=2)  # of each token's kind
        begin = begin[..., ::block]  # of that of each block's first token
        start = block * jax.lax.iota(jnp.int32, inputs.blocks)[None, None, None]  # of a block of keys
        text, before, through = count(kinds == 0), count(kinds < 1 + line), count(kinds <= 1 + line)
        own = (start + block > begin[..., None]) & (inputs.distance >= 0)[None, None]
        on_line = (start < through) & (start + block > before)
        keep = own | on_line | (start < text) | (start.swapaxes(2, 3) < text)

        near = a_shape(inputs, 0, self.window)
        limits = block * jnp.maximum(index // block - self._reach(block), 0)
        moved = Moved(order=order, back=back, limits=jnp.broadcast_to(limits, visual.shape), blocks=keep)
        return Chosen(blocks=near[None, None], moved=moved)


def _by_phase(received: jax.Array, phase: jax.Array) -> jax.Array:
    """f32 [batch, heads, length]: sums of received, like it, over the keys of each phase [batch, length]."""

    def of_row(received: jax.Array, phase: jax.Array) -> jax.Array:
        return jnp.zeros_like(received).at[:, phase].add(received, mode="drop")

    return jax.vmap(of_row)(received, phase)


def _united_sums(x: jax.Array, list_heads: int) -> jax.Array:
    """f32 [batch, list heads, length]: sums over the query heads of each list."""
    return jnp.sum(x.reshape(x.shape[0], list_heads, -1, x.shape[2]), axis=2)
