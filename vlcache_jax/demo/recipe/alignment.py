"""Alignment: the rows of a question attend to the parts of the prompt that the answer's rows will attend to.

VL-Cache keeps what the rows after the image attend to, because in large models the rows that write the answer attend to
the same (arXiv 2410.23317, section 3). A small model has no reason to: question and answer rows look things up in
different heads. This loss teaches the question's rows, and only them, to look where the answer's rows do:

    KL(a || q)     a: mean attention of the answer's rows (no gradient)     q: of the question's rows

for every question, layer and KV head, over the columns of the images and of the question itself.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.demo.recipe.ahead import QUESTION, Ahead, take


def alignment(query: jax.Array, key: jax.Array, segments: jax.Array, columns: int, ahead: Ahead) -> jax.Array:
    """The loss of one layer, f32 [].

    Args:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      segments: i32 [batch, length], see `TrainBatch`.
      columns: the first so many of the prompt hold the images.
      ahead: where questions end and answers begin.
    """
    _, length, kv_heads, head_dim = key.shape
    last, written = jnp.asarray(ahead.rows), jnp.asarray(ahead.targets) >= 0
    # The row before an answer writes its first token; the rows after that one write the others.
    writing = jnp.minimum(last[:, :, :1] + 1 + jax.lax.iota(jnp.int32, written.shape[2])[None, None], length - 1)
    asked = last[:, :, 0] > 0
    text = jnp.maximum(last[:, :, :1] - jax.lax.iota(jnp.int32, QUESTION)[None, None], 0)  # [batch, questions, text]

    segments = jnp.asarray(segments)
    own = (take(segments, text) == take(segments, last[:, :, :1])) & asked[..., None]
    text_keys = take(key, text)

    def attention(rows: jax.Array) -> jax.Array:  # -> [batch, kv_heads, questions, rows, columns + text]
        q = take(query, rows).reshape(*rows.shape, kv_heads, -1, head_dim)
        seen = own[:, :, None] & (text[:, :, None] <= rows[..., None])
        images = jnp.einsum("bqnkgd,bskd->bkqngs", q, key[:, :columns], preferred_element_type=jnp.float32)
        words = jnp.einsum("bqnkgd,bqskd->bkqngs", q, text_keys, preferred_element_type=jnp.float32)
        words = jnp.where(seen[:, None, :, :, None], words, -1e9)
        logits = jnp.concatenate([images, words], axis=-1) * head_dim**-0.5
        return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=4)

    count = jnp.maximum(jnp.sum(written, -1), 1).astype(jnp.float32)[:, None, :, None]
    answer = jnp.sum(attention(writing) * written[:, None, :, :, None].astype(jnp.float32), axis=3) / count
    answer = jax.lax.stop_gradient(answer)
    count = jnp.maximum(jnp.sum(own, -1), 1).astype(jnp.float32)[:, None, :, None]
    question = jnp.sum(attention(text) * own[:, None, :, :, None].astype(jnp.float32), axis=3) / count
    divergence = jnp.sum(answer * (jnp.log(answer + 1e-6) - jnp.log(question + 1e-6)), axis=-1)
    count = kv_heads * jnp.maximum(jnp.sum(asked), 1)
    return jnp.sum(divergence * asked[:, None].astype(jnp.float32)) / count.astype(jnp.float32)
