"""Merging evicted tokens into kept ones, between selection and packing; what is computed is told in `Merge`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlcache_jax.cache.store import lanes_spec
from vlcache_jax.kernels.varying import varying
from vlcache_jax.parallel.mesh import local

BLOCK = 128
"""Kept tokens that are compared with all tokens at once."""


def merge_evicted(
    keys: jax.Array, values: jax.Array, order: jax.Array, lengths: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """The kept tokens of every layer, with the others merged into them.

    One layer of one row at a time, and of that `BLOCK` kept tokens at a time: the temporary memory is that of
    kv_heads * length * (BLOCK + 4 head_dim) floats, whatever the batch and the depth, and a row computes the same in
    any batch. The work grows with length * kept tokens.

    Args:
      keys: [layers, batch, kv_heads, length, head_dim], all tokens of the prompts.
      values: like `keys`.
      order: i32 [layers, batch, kv_heads or 1, length], from `selection.select_layers`: the kept tokens, then `length`.
      lengths: i32 [layers, batch], tokens of a layer; padding is not looked at.
      kind: as in `Merge`.

    Returns:
      (keys, values) in the order of `order`, shapes and dtypes as before: entry i is the i-th kept token. What lies
      beyond the kept ones is arbitrary. Computed in float32 and rounded once.
    """
    rows, heads = lanes_spec(*keys.shape[1:3])
    of_heads = PartitionSpec(None, rows, heads)
    of_order = of_heads if order.shape[2] > 1 else PartitionSpec(None, rows)
    inputs = (of_heads, of_heads, of_order, PartitionSpec(None, rows))
    return local(partial(_merge, kind=kind), inputs, (of_heads, of_heads))(keys, values, order, lengths)


def _merge(
    keys: jax.Array, values: jax.Array, order: jax.Array, lengths: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """`merge_evicted` on one device, for its rows and heads."""
    batch = keys.shape[1]

    def cell(i: jax.Array, buffers: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        layer, row = i // batch, i % batch
        key, value = (x[layer, row] for x in buffers)
        merged = _merge_row(key, value, order[layer, row], lengths[layer, row], kind)
        new_key, new_value = (x.at[layer, row].set(y) for x, y in zip(buffers, merged))
        return new_key, new_value

    return jax.lax.fori_loop(0, keys.shape[0] * batch, cell, (keys, values))


def _merge_row(
    key: jax.Array, value: jax.Array, order: jax.Array, length: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """key, value [heads, tokens, d], order [heads or 1, tokens], length [] -> kept keys and values, like key."""
    heads, tokens, size = key.shape
    order = jnp.broadcast_to(order, (heads, tokens))
    order = jnp.pad(order, ((0, 0), (0, -tokens % BLOCK)), constant_values=tokens)
    count = jnp.sum(order < tokens, axis=1, dtype=jnp.int32)  # [heads]
    blocks = jnp.max(count + BLOCK - 1) // BLOCK
    valid = jax.lax.iota(jnp.int32, tokens) < length
    kept = jnp.zeros((heads, tokens), bool).at[jax.lax.iota(jnp.int32, heads)[:, None], order].set(True, mode="drop")
    both = jnp.concatenate([key, value], axis=-1).astype(jnp.float32)
    both = jnp.where(valid[:, None], both, 0)
    norm = jnp.linalg.norm(both[..., :size], axis=-1, keepdims=True)
    unit = both[..., :size] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)  # a key of zeros is like none

    def kept_tokens(block: jax.Array, x: jax.Array) -> jax.Array:
        index = jax.lax.dynamic_slice_in_dim(order, block * BLOCK, BLOCK, axis=1)
        return jnp.take_along_axis(x, jnp.minimum(index, tokens - 1)[..., None], axis=1)

    def compare(block: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot = block * BLOCK + jax.lax.iota(jnp.int32, BLOCK)
        cosine = jnp.einsum("htd,hsd->hts", unit, kept_tokens(block, unit), precision="highest")
        cosine = jnp.where(slot[None, None] < count[:, None, None], cosine, -jnp.inf)
        largest, where = jnp.max(cosine, axis=-1), slot[jnp.argmax(cosine, axis=-1)]
        better = largest > best[0]  # not if equal: ties go to the lower position, which came first
        return jnp.where(better, largest, best[0]), jnp.where(better, where, best[1])

    nothing = jnp.full((heads, tokens), -jnp.inf, jnp.float32), jnp.zeros((heads, tokens), jnp.int32)
    cosine, nearest = jax.lax.fori_loop(0, blocks, compare, varying(nothing, both, order))
    weight = cosine if kind == "weighted" else jnp.ones_like(cosine)
    nearest = jnp.where(valid[None] & ~kept, nearest, -1)

    def collect(block: jax.Array, out: jax.Array) -> jax.Array:
        slot = block * BLOCK + jax.lax.iota(jnp.int32, BLOCK)
        member = nearest[:, None] == slot[None, :, None]  # [heads, BLOCK, tokens]
        # A product with a matrix of zeros and weights: a scatter is slow on TPUs and has no fixed order on GPUs.
        chosen = jnp.where(member, weight[:, None], 0)
        total = jnp.einsum("hst,htd->hsd", chosen, both, precision="highest")
        n = jnp.sum(member, axis=-1, dtype=jnp.int32)[..., None].astype(jnp.float32)
        x = kept_tokens(block, both)
        if kind == "pivotal":
            total = (total + n * x) / 2
        merged = jnp.where(n > 0, (x + total) / (n + 1), x)
        return jax.lax.dynamic_update_slice_in_dim(out, merged.astype(out.dtype), block * BLOCK, axis=1)

    out = jnp.zeros((heads, order.shape[1], 2 * size), key.dtype)
    out = jax.lax.fori_loop(0, blocks, collect, varying(out, both, order))[:, :tokens]
    return out[..., :size], out[..., size:]
