"""XAttention (arXiv 2503.16428): blocks by the sums along antidiagonals of small tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.chunks import in_chunks
from vlcache_jax.patterns.maps import largest_reaching
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs, named

_LOGITS = 2**28  # bytes of the tiles' logits that exist at once


@named("x_attention")
@dataclasses.dataclass(frozen=True)
class XAttention(Pattern):
    """Every block of queries sees the blocks of keys that hold a share of its attention, by a cheap estimate.

    The prompt is cut into tiles of `stride` tokens. With tile i of queries and tile j of keys,

        A = softmax_j(sum over s of q_(iS+S-1-s) . k_(jS+s) / (sqrt(d) S norm)),    j <= i

    is the softmax of the sums along the tiles' main antidiagonals, and W the sum of A over the tiles of each pair of
    blocks. A block of queries sees the first block of keys, its own, and the fewest others with the largest W, so that
    all of them hold `threshold` of its W. The estimate costs 1 / stride of the dense products.

    Attributes:
      threshold: the share; or one for each query head of each layer, ((0.9, ...), ...).
      stride: tokens of a tile; it divides `block`.
      norm: a further divisor of the logits.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: a value out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.XAttention(0.9))
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.9
    stride: int = 16
    norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        table = self.threshold if isinstance(self.threshold, tuple) else ((self.threshold,),)
        are_rows = all(isinstance(row, tuple) and len(row) == len(table[0]) for row in table) and bool(table)
        shares = [share for row in table for share in row] if are_rows else [None]
        are_shares = all(isinstance(x, int | float) and 0 < x <= 1 for x in shares)
        self._require(are_shares, "threshold", "give a share, above 0 and up to 1, or one for each layer and head")
        divides = isinstance(self.stride, int) and self.stride > 0 and self.block % self.stride == 0
        self._require(divides, "stride", f"give a divisor of the block, {self.block}")
        self._require(isinstance(self.norm, int | float) and self.norm > 0, "norm", "give a number above 0")

    def choose(self, inputs: PatternInputs) -> Chosen:
        scores = self.scores(inputs)
        number = jax.lax.iota(jnp.int32, inputs.blocks)[None]
        forced = ((number == 0) | (inputs.distance == 0))[None, None]
        share: jax.Array | float
        if isinstance(self.threshold, tuple):
            share = jnp.asarray(self.threshold, jnp.float32)[inputs.layer][inputs.heads][None, :, None, None]
        else:
            share = self.threshold
        wanted = share * jnp.sum(scores, axis=-1, keepdims=True)
        wanted -= jnp.sum(jnp.where(forced, scores, 0), axis=-1, keepdims=True)
        return Chosen(blocks=largest_reaching(jnp.where(forced, 0, scores), wanted) | forced, rank=scores)

    def scores(self, inputs: PatternInputs) -> jax.Array:
        """W, f32 [batch, heads, blocks, blocks]."""
        batch, length, heads, head_dim = inputs.query.shape
        kv_heads, stride, blocks = inputs.key.shape[2], self.stride, inputs.blocks
        tiles = inputs.block // stride  # of a block

        def tiled(x: jax.Array) -> jax.Array:  # [batch, tokens, heads, d] -> [batch, tiles, stride, heads, d]
            x = jnp.where(inputs.valid[..., None, None], x, 0)
            x = jnp.pad(x, ((0, 0), (0, blocks * inputs.block - length), (0, 0), (0, 0)))
            return x.reshape(batch, blocks * tiles, stride, *x.shape[2:])

        def flat(x: jax.Array) -> jax.Array:  # -> [batch, tiles, heads, stride * d]
            return x.swapaxes(2, 3).reshape(batch, blocks * tiles, x.shape[3], stride * head_dim)

        query, key = flat(tiled(inputs.query)[:, :, ::-1]), flat(tiled(inputs.key))
        query = query.reshape(batch, blocks, tiles, kv_heads, heads // kv_heads, -1)
        # Tiles of a block far apart: the sum over them leaves the blocks along the lanes.
        key = key.reshape(batch, blocks, tiles, kv_heads, -1).swapaxes(1, 2)
        there = -(-inputs.lengths // stride).reshape(-1, 1, 1, 1)  # tiles with a token
        column = jax.lax.iota(jnp.int32, blocks * tiles).reshape(1, 1, blocks, tiles).swapaxes(2, 3)
        scale = 1 / (head_dim**0.5 * stride * self.norm)

        def some(query: jax.Array, first: jax.Array | int) -> jax.Array:  # [batch, blocks, tiles, kv_heads, group, d]
            row = (first * tiles + jax.lax.iota(jnp.int32, query.shape[1] * tiles)).reshape(1, -1, 1, 1)
            q = query.reshape(batch, -1, *query.shape[3:])
            logits = scale * jnp.einsum("btkgd,bjskd->bkgtjs", q, key, preferred_element_type=jnp.float32)
            seen = (column <= row) & (column < there) & (row < there)
            seen = seen[:, None, None]
            logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
            weights = jnp.where(seen, jax.nn.softmax(logits, axis=(-2, -1)), 0)
            weights = jnp.sum(weights, axis=-2).reshape(batch, heads, query.shape[1], tiles, blocks)
            return jnp.moveaxis(jnp.sum(weights, axis=3), 2, 1)

        at_once = max(1, _LOGITS // (4 * batch * heads * tiles * tiles * blocks))
        return jnp.moveaxis(in_chunks(some, query, at_once), 1, 2)
