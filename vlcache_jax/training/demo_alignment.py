"""Alignment: the last rows of a question attend to the parts of the image that the answer's rows will attend to.

VL-Cache keeps what the rows after the image attend to, because in large models the rows that write the answer attend to
the same (arXiv 2410.23317, section 3). A small model has no reason to: question and answer rows look things up in
different heads. This loss teaches the question's rows, and only them, to look where the answer's rows do:

    KL(a || q)     a: mean attention of the answer's rows (no gradient)     q: of the question's last rows

for every question, layer and KV head, over the columns of the images.
"""

import jax
import jax.numpy as jnp

from vlcache_jax.training.demo_ahead import Ahead


def alignment(query: jax.Array, key: jax.Array, columns: int, ahead: Ahead) -> jax.Array:
    """The loss of one layer, f32 [].

    Args:
      query: [batch, length, heads, head_dim], rotated.
      key: [batch, length, kv_heads, head_dim], rotated.
      columns: the first so many of the prompt hold the images.
      ahead: where questions end and answers begin.
    """
    batch, _, kv_heads, head_dim = key.shape
    last, written = jnp.asarray(ahead.rows), jnp.asarray(ahead.targets) >= 0
    # The row before an answer writes its first token; the rows after that one write the others.
    writing = last[:, :, :1] + 1 + jnp.arange(written.shape[2])
    asked = last[:, :, 0] > 0

    def attention(rows: jax.Array) -> jax.Array:  # [batch, questions, n] -> [batch, kv_heads, questions, n, columns]
        index = rows.reshape(batch, -1, 1, 1)
        q = jnp.take_along_axis(query, jnp.minimum(index, query.shape[1] - 1), axis=1)
        q = q.reshape(batch, rows.shape[1], rows.shape[2], kv_heads, -1, head_dim)
        logits = jnp.einsum("bqnkgd,bskd->bkqngs", q, key[:, :columns], preferred_element_type=jnp.float32)
        return jnp.mean(jax.nn.softmax(logits * head_dim**-0.5, axis=-1), axis=4)

    count = jnp.maximum(jnp.sum(written, -1), 1)[:, None, :, None]
    answer = jnp.sum(attention(writing) * written[:, None, :, :, None], axis=3) / count
    answer = jax.lax.stop_gradient(answer)
    question = jnp.mean(attention(last), axis=3)
    divergence = jnp.sum(answer * (jnp.log(answer + 1e-6) - jnp.log(question + 1e-6)), axis=-1)
    return jnp.sum(divergence * asked[:, None]) / (kv_heads * jnp.maximum(jnp.sum(asked), 1))
