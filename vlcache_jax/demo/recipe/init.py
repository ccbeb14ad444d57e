"""Where the demo's decoder starts: able to match and to copy, so that training need not discover either.

Both take a small transformer thousands of steps to find when it starts from noise, because each is useless without
the other.
"""

import string
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.demo.data.labels import WORDS
from vlcache_jax.demo.data.tokenizer import build_tokenizer
from vlcache_jax.demo.data.words import COLOURS, SHAPES, plural
from vlcache_jax.demo.recipe.vision import PatchBatch, normalise
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.training.state import Params

_BATCHES = 36
_RIDGE = 3.0


def word_directions(model: Llava, params: Params, batches: Iterator[PatchBatch]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the words that can be seen, and the direction in which projected features show each.

    As in contrastive pre-training, a word's embedding then looks like the patches it is written on. The directions
    are the weights of a ridge regression from normalised features to the patch labels.

    Returns:
      (ids i32 [words], directions f32 [words, decoder hidden] with root mean square 1).
    """
    keys = [*WORDS, *COLOURS, *SHAPES, *string.digits]

    @jax.jit
    def encode(params: Params, batch: PatchBatch) -> jax.Array:
        features = model.apply({"params": params}, normalise(batch.pixels), batch.patch_ids, method="encode_images")
        features = features.reshape(-1, features.shape[-1])
        return features * jax.lax.rsqrt(jnp.mean(features**2, -1, keepdims=True) + 1e-6)

    seen, shown = [], []
    for batch in islice(batches, 0, _BATCHES, 3):  # images come several times in a row
        features = np.asarray(encode(params, batch), np.float64)
        target = np.zeros((len(features), len(keys)))
        # Of a value's digits, the first: it is the one asked for first.
        labels = {name: np.asarray(x).reshape(len(features), -1)[:, 0] for name, x in batch.labels.items()}
        for name, first, halves in (
            ("word", 0, 2),
            ("owner", 0, 1),
            ("colour", len(WORDS), 1),
            ("shape", len(WORDS) + len(COLOURS), 1),
            ("digits", len(WORDS) + len(COLOURS) + len(SHAPES), 1),
        ):
            rows = np.flatnonzero(labels[name])
            target[rows, first + (labels[name][rows] - 1) // halves] = 1.0
        seen.append(np.concatenate([features, np.ones((len(features), 1))], axis=1))
        shown.append(target)
    x, y = np.concatenate(seen), np.concatenate(shown)
    weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)[:-1].T
    weights /= np.sqrt(np.mean(weights**2, axis=1, keepdims=True)) + 1e-9
    tokenizer = build_tokenizer()
    names = [*keys, *map(plural, SHAPES)]
    ids = np.array([tokenizer.token_to_id(name) for name in names], np.int32)
    plurals = weights[[keys.index(shape) for shape in SHAPES]]
    return ids, np.concatenate([weights, plurals]).astype(np.float32)


def matching_attention(key: jax.Array, attention: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Attention projections whose queries are their keys, and whose outputs undo their values.

    Rows then attend to tokens like themselves and copy what they find ("mimetic initialisation", Trockman and
    Kolter, arXiv 2305.09828). Each KV head works in random orthonormal directions of its own.

    Args:
      key: of the random directions.
      attention: parameters of all layers, kernels [layers, in, out].
      config: sizes.
    """
    layers, width, size = config.num_layers, config.hidden_size, config.head_dim
    group = config.num_heads // config.num_kv_heads

    def directions(key: jax.Array) -> jax.Array:  # [layers, kv_heads, width, head_dim]
        noise = jax.random.normal(key, (layers, config.num_kv_heads, width, size))
        return jnp.linalg.qr(noise)[0]

    match, copy = (directions(k) for k in jax.random.split(key))

    def heads(x: jax.Array) -> jax.Array:  # [layers, n, width, size] -> [layers, width, n * size]
        return x.swapaxes(1, 2).reshape(layers, width, -1)

    query = attention["query"]["kernel"] + heads(jnp.repeat(match, group, axis=1)) * 0.4
    output = jnp.repeat(copy, group, axis=1).swapaxes(2, 3).reshape(layers, -1, width) * 0.15
    return attention | {
        "query": attention["query"] | {"kernel": query},
        "key": attention["key"] | {"kernel": heads(match)},
        "value": attention["value"] | {"kernel": heads(copy)},
        "output": attention["output"] | {"kernel": attention["output"]["kernel"] * 0.5 + output},
    }
