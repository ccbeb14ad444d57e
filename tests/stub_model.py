"""A model that is nothing but queries, keys and values: what a policy sees, without the cost of a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.families.module import in_order
from vlcache_jax.typing import ModelSpec, WithOutput

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3, 4, 2, 8, 11
SIDE = 4  # patches along one side of a tile
OUTPUT = np.random.default_rng(8).lognormal(size=(LAYERS, HEADS, HEAD_DIM, 5))
"""Output projections, of which a score may ask."""


@dataclasses.dataclass(frozen=True)
class StubModel:
    """Its parameters are the rotated queries, keys and values of every layer, [layers, batch, length, heads, d].

    Of a prompt that is said twice they are the same both times. A hidden state is the token's place in its prompt.
    """

    dtype: str = "float32"

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            num_layers=LAYERS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_positions=512,
            dtype=jnp.dtype(self.dtype),
            vision_grid=SIDE,
        )

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        return getattr(self, method)(*([variables["params"]] if "params" in variables else []), *args)

    def embed(self, params, batch):
        place = jnp.broadcast_to(jnp.arange(batch.length, dtype=jnp.float32), batch.tokens.shape)
        return in_order(place[..., None], batch)

    def decode(self, params, hidden, positions, attend, carry=None, xs=None):
        def layer(carry, item):
            (query, key, value), x, output = item
            told = (output,) if isinstance(attend, WithOutput) else ()
            _, carry, ys = attend(query, key, value, carry, x, *told)
            return carry, ys

        computed = params["query"], params["key"], params["value"]
        if hidden.shape[1] > computed[0].shape[2]:  # prompts that are said twice
            place = hidden[None, ..., None].astype(jnp.int32)
            computed = tuple(jnp.take_along_axis(x, place, axis=2) for x in computed)
        carry, ys = jax.lax.scan(layer, carry, (computed, xs, jnp.asarray(OUTPUT, self.dtype)))
        return hidden, carry, ys

    def unembed(self, params, hidden):
        return jnp.zeros((*hidden.shape[:-1], VOCAB))

    def rotate(self, x, positions):
        frequency = 100.0 ** (-jnp.arange(HEAD_DIM // 2, dtype=jnp.float32) / (HEAD_DIM // 2))
        angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def stub_params(batch: Batch, seed: int = 0, dtype: str = "float32"):
    """Random queries, keys and values with common directions and a few attention sinks, as real ones have."""
    rng = np.random.default_rng(seed)

    def draw(heads):
        return rng.normal(size=(LAYERS, batch.size, batch.length, heads, HEAD_DIM))

    sharp = np.array([0.2, 0.8, 2.5])[:, None, None, None, None]  # layers differ in sparsity
    mean, asked = (rng.normal(size=(LAYERS, 1, 1, 1, HEAD_DIM)) for _ in range(2))
    heavy = rng.random((LAYERS, batch.size, batch.length, 1, 1)) < 0.1  # attention sinks: large keys, small values
    query, key = sharp * draw(HEADS) + 0.7 * asked, draw(KV_HEADS) + 0.5 * mean + 1.5 * heavy * asked
    value = np.where(heavy, 0.2, 1) * draw(KV_HEADS)
    return {"query": query.astype(dtype), "key": key.astype(dtype), "value": value.astype(dtype)}


def stub_batch(length: int = 40, seed: int = 0) -> Batch:
    """Rows in turn: one image, two images with some patches left out, text only, ending in its image, very short."""
    rng = np.random.default_rng(seed)
    size = 5
    index = np.full((size, length), TEXT, np.int32)
    index[0, 2 : 2 + SIDE**2] = np.arange(SIDE**2)
    patches = np.sort(rng.permutation(2 * SIDE**2)[:20])
    index[1, 1 : 1 + len(patches)] = patches
    index[3, 5 : 5 + SIDE**2] = np.arange(SIDE**2)
    index[4, 1] = 0
    lengths = np.array([rng.integers(24, 41), rng.integers(26, 41), rng.integers(10, 41), 5 + SIDE**2, 3], np.int32)
    index = np.where(np.arange(length) < lengths[:, None], index, TEXT)
    return Batch(np.zeros((size, length), np.int32), lengths, index, np.zeros((size, 0, 4, 4, 3), np.float32))


def kept_sets(state) -> list:
    """Kept prompt positions [layer][row][head], as lists; in numpy, where shapes that differ cost no compilation."""
    context = state.context
    positions, offsets, lengths = (np.asarray(x) for x in (context.positions, context.offsets, context.lengths))
    batch, lanes, _ = positions.shape
    heads = max(lanes, offsets.shape[2])

    def one(layer, row, head):
        segment = min(head, offsets.shape[2] - 1)
        start = offsets[row, layer, segment]
        return positions[row, head * lanes // heads, start : start + lengths[row, layer, segment]].tolist()

    return [[[one(i, row, head) for head in range(heads)] for row in range(batch)] for i in range(offsets.shape[1])]
