"""FlexPrefill (ICLR 2025, arXiv 2502.20766): each head's pattern and size, by what the last rows attend to."""

import dataclasses

import jax
import jax.numpy as jnp

from vlcache_jax.cache.selection import largest
from vlcache_jax.patterns.maps import block_means, diagonals, largest_reaching, largest_within
from vlcache_jax.patterns.pattern import Chosen, Pattern, PatternInputs, named


@named("flex_prefill")
@dataclasses.dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Vertical and slash blocks that hold a share of the last rows' attention; more where these rows do not tell.

    With P the attention of the prompt's last `block` rows, v_j its mean over the rows, of key j, and s_o that over the
    rows at distance o: a head gets as many vertical blocks as floor(c / block) + 1, c being how many of the largest v
    make up `gamma`, those with the largest sums of v, the first one always; slash blocks likewise by s, the diagonal
    always. At least `min_budget` tokens of each.

    Where sqrt(JS(softmax(mean of the rows' q . block means of k / sqrt(d)), block sums of v)) < `tau`, block means are
    a good estimate: such a head gets the smallest number of both, and of the whole map softmax(block means of q . block
    means of k / sqrt(d)) its largest entries up to a sum of gamma x blocks.

    Distances are counted in blocks from the diagonal; the authors count them from the prompt's end, which is the same
    where the length is a multiple of the block.

    Attributes:
      gamma: the share of attention.
      tau: the bound for the second kind of head; 0 for none.
      min_budget: tokens, by whole blocks.
      heads, capacity, min_tokens, dense_layers, block: see `Pattern`.

    Raises:
      PolicyError: a value out of range.

    Example:
      out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.1), prefill=vlc.FlexPrefill(0.95))
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = isinstance(self.gamma, int | float) and 0 < self.gamma <= 1
        self._require(is_share, "gamma", "give a share, above 0 and up to 1")
        self._require(isinstance(self.tau, int | float) and self.tau >= 0, "tau", "give a number of at least 0")
        is_whole = isinstance(self.min_budget, int) and self.min_budget >= 1
        self._require(is_whole, "min_budget", "give a whole number of at least 1")

    @property
    def last_rows(self) -> int:
        return self.block

    def choose(self, inputs: PatternInputs) -> Chosen:
        last, block, blocks = inputs.last, inputs.block, inputs.blocks
        assert last is not None
        count = last.count.astype(jnp.float32)[:, None, None]
        vertical, slash = last.vertical / count, last.slash / count
        there = -(-inputs.lengths // block)  # blocks with a token
        fewest = -(-self.min_budget // block)

        def number(x: jax.Array) -> jax.Array:  # of blocks, i32 [batch, heads, 1]
            cover = largest_reaching(x, jnp.full((1, 1, 1), self.gamma)) & inputs.valid[:, None]
            wanted = jnp.sum(cover, axis=-1, keepdims=True, dtype=jnp.int32) // block + 1
            return jnp.clip(wanted, fewest, jnp.maximum(fewest, there)[:, None, None])

        def of_blocks(x: jax.Array) -> jax.Array:  # [batch, heads, length] -> [batch, heads, blocks]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * block - x.shape[2])))
            return jnp.sum(x.reshape(*x.shape[:2], blocks, block), axis=3)

        vertical_number, slash_number = number(vertical), number(slash)
        vertical, slash = of_blocks(vertical), of_blocks(slash)
        index = jax.lax.iota(jnp.int32, blocks)[None, None]
        inside = index < there[:, None, None]
        q, k = self._means(inputs)
        by_query = jnp.zeros((*vertical.shape[:2], 1), bool)
        if self.tau:
            by_query = self._divergence(inputs, vertical, inside, k) < self.tau
        vertical_number, slash_number = (jnp.where(by_query, fewest, n) for n in (vertical_number, slash_number))

        def best(x: jax.Array, number: jax.Array) -> jax.Array:
            x = jnp.where(index == 0, jnp.inf, jnp.where(inside, x, -jnp.inf))
            return largest(x, number) & inside

        keep = best(vertical, vertical_number)[:, :, None] | diagonals(best(slash, slash_number))
        logits = jnp.einsum("btkgd,bskd->bkgts", q, k) * inputs.query.shape[3] ** -0.5
        logits = logits.reshape(keep.shape)
        causal = (inputs.distance >= 0)[None, None] & inside[..., None]
        logits = jnp.where(causal, logits, jnp.finfo(jnp.float32).min)
        pooled = jnp.where(causal, jax.nn.softmax(logits, axis=-1), 0)
        if self.tau:
            share = (self.gamma * there.astype(jnp.float32))[:, None, None]
            flat = largest_within(pooled.reshape(*keep.shape[:2], -1), share)
            keep |= flat.reshape(keep.shape) & by_query[..., None]
        return Chosen(blocks=keep, rank=pooled)

    def _means(self, inputs: PatternInputs) -> tuple[jax.Array, jax.Array]:
        """Block means of queries [batch, blocks, kv_heads, group, d], and of keys."""
        kv_heads = inputs.key.shape[2]
        q, k = (block_means(x, inputs.lengths, inputs.block, true_counts=True) for x in (inputs.query, inputs.key))
        return q.reshape(*q.shape[:2], kv_heads, -1, q.shape[3]), k

    def _divergence(self, inputs: PatternInputs, vertical: jax.Array, inside: jax.Array, k: jax.Array) -> jax.Array:
        """f32 [batch, heads, 1]: the root of the Jensen-Shannon divergence of the two estimates of block sums."""
        assert inputs.last is not None
        batch, length, heads, head_dim = inputs.query.shape
        row = jax.lax.iota(jnp.int32, length)[None]
        of_last = ((row >= inputs.last.first[:, None]) & inputs.valid).astype(jnp.float32)
        mean = jnp.einsum("bt,bthd->bhd", of_last, jnp.where(inputs.valid[..., None, None], inputs.query, 0))
        mean = (mean / inputs.last.count.astype(jnp.float32)[:, None, None]).reshape(batch, k.shape[2], -1, head_dim)
        logits = jnp.einsum("bkgd,bskd->bkgs", mean, k).reshape(batch, heads, -1) * head_dim**-0.5
        logits = jnp.where(inside, logits, jnp.finfo(jnp.float32).min)
        one = jnp.where(inside, jax.nn.softmax(logits, axis=-1), 0)
        middle = (one + vertical) / 2

        def relative(x: jax.Array) -> jax.Array:
            ratio = jnp.where(x > 0, x / jnp.where(middle > 0, middle, 1), 1)
            return jnp.sum(x * jnp.log(ratio), axis=-1, keepdims=True)

        return jnp.sqrt(jnp.maximum(0.5 * relative(one) + 0.5 * relative(vertical), 0))
