"""MMInference's idea (ICML 2025, arXiv 2504.16083): visual queries look at a grid, and at their own neighbourhood."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.errors import PolicyError
from vlcache_jax.patterns.a_shape import a_shape
from vlcache_jax.patterns.last_rows import last_rows_attention
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs, named

_ROWS = 64


@named("mm_inference")
@dataclasses.dataclass(frozen=True)
class MMInference(Pattern):
    """Text queries see everything before them; visual ones text, a grid of visual keys, and what lies near.

    With P the attention of 64 rows, and j counted from a prompt's first visual token, each head takes the stride r and
    the phase p for which

        sum of P over visual keys j with j mod r = p

    is largest, r being the tokens from one row of an image to the next or from one frame, tile or image to the next;
    it sees these keys from all queries behind them. Besides, a block of queries sees the blocks of keys that hold text
    and those of the `window` tokens before each query; one that holds a text token is dense.

    No code of the paper is public. Strides are not searched for but are those of the model; and keys of a class are
    single columns for all queries, where the paper permutes queries and keys so that a class is a block.

    Attributes:
      window: tokens before a query.
      boundary: "query": the 64 rows are the last visual ones, since visual and text queries differ; "none": the last
        ones of the prompt.
      most_columns: room for single columns of a list; None for a sixteenth of the padded prompt.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: a value out of range; or, in a prefill, a model that does not tell where its visual tokens lie.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.MMInference())
    """

    window: int = 1024
    boundary: str = "query"
    most_columns: int | None = None
    needs_whole_images: ClassVar[str | None] = "it counts the tokens from one row of an image to the next"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("window", 1), ("most_columns", 0)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            self._require(is_whole or (value is None and not low), name, f"give a whole number of at least {low}")
        self._require(self.boundary in ("query", "none"), "boundary", "use 'query' or 'none'")

    def columns(self, length: int) -> int:
        """See `Pattern.columns`."""
        return min(-(-length // 16) if self.most_columns is None else self.most_columns, length)

    def choose(self, inputs: PatternInputs) -> Chosen:
        """See `Pattern.choose`."""
        if inputs.grid is None:
            raise PolicyError("MMInference: this model does not tell where its visual tokens lie: use another pattern")
        visual = inputs.vision & inputs.valid
        index = jax.lax.iota(jnp.int32, inputs.length)[None]
        end = jnp.max(jnp.where(visual, index, -1), axis=1) + 1
        rows_end = jnp.where(end > 0, end, inputs.lengths) if self.boundary == "query" else inputs.lengths
        received = last_rows_attention(inputs.query, inputs.key, rows_end, _ROWS).vertical
        received = _united_sums(received, inputs.key.shape[2] if self.heads == "group" else len(inputs.heads))
        first = jnp.argmax(visual, axis=1).astype(jnp.int32)[:, None]
        classes = []  # of each stride: bool [batch, list heads, length], and its share
        for axis in (0, 1):
            stride = inputs.grid[:, axis][:, None]
            phase = jnp.where(visual & (stride > 0), (index - first) % jnp.maximum(stride, 1), inputs.length)
            sums = _by_phase(received, phase)
            best = jnp.argmax(sums, axis=2).astype(jnp.int32)[..., None]
            classes.append((phase[:, None] == best, jnp.max(sums, axis=2)))
        (of_row, row_sum), (of_frame, frame_sum) = classes
        columns = jnp.where((row_sum >= frame_sum)[..., None], of_row, of_frame)
        text = _blocks_with(~inputs.vision & inputs.valid, inputs.block)  # [batch, blocks]
        near = a_shape(inputs, 0, self.window)[None]
        keep = near | text[:, None] | text[..., None]
        return Chosen(blocks=keep[:, None], columns=columns, column_rank=received)


def _by_phase(received: jax.Array, phase: jax.Array) -> jax.Array:
    """f32 [batch, heads, length]: sums of received, like it, over the keys of each phase [batch, length]."""

    def of_row(received: jax.Array, phase: jax.Array) -> jax.Array:
        return jnp.zeros_like(received).at[:, phase].add(received, mode="drop")

    return jax.vmap(of_row)(received, phase)


def _blocks_with(x: jax.Array, block: int) -> jax.Array:
    """bool [batch, blocks]: whether any token of a block has what x [batch, length] says."""
    return jnp.any(jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block), axis=2)


def _united_sums(x: jax.Array, list_heads: int) -> jax.Array:
    """f32 [batch, list heads, length]: sums over the query heads of each list."""
    return jnp.sum(x.reshape(x.shape[0], list_heads, -1, x.shape[2]), axis=2)
