"""MInference's offline search: the pattern that keeps most of each head's attention, on prompts of one's own."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import InputError
from vlcache_jax.inference.forward import embed_prompt, run_layers
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.validation import check_recipe
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.parallel.placing import placed
from vlcache_jax.patterns.m_inference import KINDS, Head, MInference
from vlcache_jax.patterns.pattern import PatternInputs, with_last_rows
from vlcache_jax.typing import Params, VisionLanguageModel

VERTICAL, SHAPE, BLOCKS = KINDS
CANDIDATES: tuple[Head, ...] = (
    (SHAPE, 100, 800),
    (VERTICAL, 30, 800),
    (VERTICAL, 100, 750),
    (VERTICAL, 500, 700),
    (VERTICAL, 3500, 100),
    (BLOCKS, 1, 1),
)
"""The authors', which cost about the same: sinks and window, single columns and diagonals, blocks."""
_ROWS = 64  # of queries that are looked at together


def search_heads(
    model: VisionLanguageModel,
    params: Params,
    batches: Iterable[Batch],
    candidates: Sequence[Head] = CANDIDATES,
    *,
    first_row: int | None = None,
    block: int = 128,
) -> list[dict[str, list[Any]]]:
    """Finds which candidate suits each head: the one that keeps the largest share of its attention.

    Of a head, the share is that of the attention of all rows from `first_row` on that goes to the keys which
    `MInference` would list for the candidate, with lists of query heads; averaged over rows, and over prompts. The
    prompts run dense. Memory grows with the length, time with its square.

    Args:
      model: a Flax module such as `vlm.model`.
      params: its parameters.
      batches: prompts, of any sizes; each size compiles a program.
      candidates: (kind, v, s) as in the authors' files, in the order in which equal ones are taken.
      first_row: below it all candidates keep everything; None for 2,500, or a quarter of a shorter prompt.
      block: of `MInference`.

    Returns:
      What the authors' files hold: for each layer {"head": [kind, v, s, share]}.

    Raises:
      InputError: no prompts, or no candidates.
      PolicyError: a candidate that is none, or a model without layers that see all tokens.

    Example:
      found = search_heads(vlm.model, vlm.params, [vlm.processor(images, texts)])
      Path("heads.json").write_text(json.dumps(found))  # for vlc.MInference("heads.json")
    """
    if not candidates:
        raise InputError("there are no candidates to choose from: give some (kind, v, s)")
    layers = model.spec.num_layers
    patterns = tuple(MInference(((head,),) * layers, heads="each", min_tokens=0, block=block) for head in candidates)
    for pattern in patterns:
        check_recipe(model.spec, Recipe(prefill=pattern))
    shares: list[np.ndarray] = []
    for batch in batches:
        batch = placed(batch, params)
        with on_mesh_of(params, batch):
            shares.extend(np.asarray(_kept(model, params, batch, patterns, first_row)))
    if not shares:
        raise InputError("there are no prompts to search on: give some")
    found = np.mean(shares, axis=0)  # [layers, candidates, heads]
    best = found.argmax(axis=1)
    return [
        {
            str(head): [*candidates[best[layer, head]], round(float(found[layer, best[layer, head], head]), 4)]
            for head in range(found.shape[2])
        }
        for layer in range(layers)
    ]


@partial(jax.jit, static_argnames=("model", "patterns", "first_row"))
@automatic
def _kept(
    model: VisionLanguageModel, params: Params, batch: Batch, patterns: tuple[MInference, ...], first_row: int | None
) -> jax.Array:
    """f32 [batch, layers, patterns, heads]: the share of attention that each pattern keeps."""
    lengths = jnp.asarray(batch.lengths)
    start = jnp.minimum(lengths // 4, 2500) if first_row is None else jnp.full_like(lengths, first_row)

    def attend(query, key, value, carry, layer):
        out, _ = ops.layer_attention(
            Kernels(), model.spec.layer_windows, layer, query, key, value, lengths, with_lse=False
        )
        shares = [kept_attention(pattern, query, key, lengths, layer, start) for pattern in patterns]
        return out, carry, jnp.stack(shares, axis=1)

    embedded = embed_prompt(model, params, batch)
    _, _, shares = run_layers(model, params, embedded, attend, None, jax.lax.iota(jnp.int32, model.spec.num_layers))
    return jnp.moveaxis(shares, 0, 1)


def kept_attention(
    pattern: MInference, query: jax.Array, key: jax.Array, lengths: jax.Array, layer: jax.Array, start: jax.Array
) -> jax.Array:
    """The share of the attention of rows `start` i32 [batch] and later that goes to keys which a pattern lists.

    Args:
      pattern: with lists of query heads.
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim].
      lengths: i32 [batch].
      layer: i32 [], its number.

    Returns:
      f32 [batch, heads], the mean over rows.
    """
    batch, length, heads, head_dim = query.shape
    inputs = PatternInputs(
        query=query,
        key=key,
        lengths=lengths,
        vision=jnp.zeros((batch, length), bool),
        layer=layer,
        heads=jnp.zeros((heads,), jnp.int32),  # the candidate is that of head 0
        grid=None,
        block=pattern.block,
    )
    chosen = pattern.choose(with_last_rows(pattern, inputs))
    own = (inputs.distance == 0)[None, None]
    blocks = jnp.broadcast_to(chosen.blocks | own, (batch, heads, inputs.blocks, inputs.blocks))
    singles = chosen.columns
    assert singles is not None
    column, group = jax.lax.iota(jnp.int32, length), heads // key.shape[2]

    def of_rows(total: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        row = first + jax.lax.iota(jnp.int32, size)
        at = jnp.minimum(row, length - 1)
        rows = query[:, at].reshape(batch, size, -1, group, head_dim)
        logits = jnp.einsum("brhgd,bkhd->bhgrk", rows, key, preferred_element_type=jnp.float32)
        seen = (column[None] <= at[:, None])[None, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits * head_dim**-0.5, -jnp.inf), axis=-1)
        weights = weights.reshape(batch, heads, size, length)
        listed = blocks[:, :, at // pattern.block][..., column // pattern.block] | singles[:, :, None]
        share = jnp.sum(jnp.where(listed, weights, 0), axis=3)
        counts = (row[None] >= start[:, None]) & (row[None] < lengths[:, None])
        return total + jnp.sum(jnp.where(counts[:, None], share, 0), axis=2), None

    size = min(_ROWS, length)
    firsts = size * jax.lax.iota(jnp.int32, -(-length // size))
    total, _ = jax.lax.scan(of_rows, jnp.zeros((batch, heads), jnp.float32), firsts)
    return total / jnp.maximum(lengths - start, 1)[:, None].astype(jnp.float32)
