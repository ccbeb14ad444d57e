"""The attention of a policy's rows, some rows at a time: for scores that need more of it than column sums."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlcache_jax.kernels.varying import varying
from vlcache_jax.policies.scores.attention import LayerInputs

_ROWS = 32  # whose logits exist at once


def logits_of(inputs: LayerInputs, index: jax.Array) -> jax.Array:
    """Logits of the prompt rows `index` i32 [batch, some] with all keys: f32 [batch, kv_heads, group, some, length]."""
    batch, _, heads, head_dim = inputs.query.shape
    kv_heads, key = inputs.key.shape[2], inputs.key.astype(jnp.float32)
    query = jnp.take_along_axis(inputs.query, index[..., None, None], axis=1).astype(jnp.float32)
    query = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    return head_dim**-0.5 * jnp.einsum("bthgd,bshd->bhgts", query, key, precision="highest")


def fold_rows(
    inputs: LayerInputs,
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    total: jax.Array,
    columns: jax.Array | None = None,
) -> jax.Array:
    """total = step(total, row, chosen, logits) over the rows that score the keys, in blocks.

    Args:
      inputs: of a layer; the rows are the last `inputs.rows` ones.
      step: given `row` i32 [batch, some], their places; `chosen` bool [batch, some], whether they count; and `logits`
        f32 [batch, kv_heads, group, some, length], -inf in columns that a row does not see, 0 in rows that do not
        count.
      total: what it starts from.
      columns: bool [batch, length], the only ones that are looked at; None for all.
    """
    length = inputs.key.shape[1]
    column = jax.lax.iota(jnp.int32, length)[None]
    first = inputs.lengths - inputs.rows
    reach = inputs.mask.last()  # the last column that each row sees
    reach = jnp.broadcast_to(column, inputs.valid.shape) if reach is None else reach
    seen = inputs.valid if columns is None else columns

    def block(number: jax.Array, total: jax.Array) -> jax.Array:
        wanted = first[:, None] + number * _ROWS + jax.lax.iota(jnp.int32, _ROWS)[None]
        row = jnp.minimum(wanted, length - 1)
        chosen = wanted < inputs.lengths[:, None]
        sees = seen[:, None] & (column[None] <= jnp.take_along_axis(reach, row, axis=1)[..., None])
        logits = jnp.where(sees[:, None, None], logits_of(inputs, row), -jnp.inf)
        return step(total, row, chosen, jnp.where(chosen[:, None, None, :, None], logits, 0))

    blocks = (jnp.max(inputs.rows) + _ROWS - 1) // _ROWS
    return jax.lax.fori_loop(0, blocks, block, varying(total, inputs.key, seen))


def softmax_of_rows(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Each row's softmax, weighted: f32 [batch, kv_heads, length], the mean over the query heads of a KV head.

    Args:
      logits: f32 [batch, kv_heads, group, some, length].
      weights: f32 [batch, some]; where one is 0 the row does not count, whatever its logits are.
    """
    attention, weights = jax.nn.softmax(logits, axis=-1), weights[:, None, None, :, None]
    return jnp.mean(jnp.sum(jnp.where(weights == 0, 0, weights * attention), axis=3), axis=2)
