"""A decoder as a model of text alone, without torch."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.module import in_order
from vlcache_jax.typing import ModelSpec


class TextModel(nn.Module):
    """A decoder as a model of text alone; parameters are {"decoder": ...}."""

    config: DecoderConfig
    dtype: str = "float32"

    def setup(self):
        self.decoder = Decoder(self.config, jnp.dtype(self.dtype))

    def __call__(self, batch):
        def nothing(query, key, value, carry, xs):
            return query, carry, None

        hidden, _, _ = self.decode(self.embed(batch).hidden, jnp.zeros(batch.tokens.shape, jnp.int32), nothing)
        return self.unembed(hidden)

    @property
    def spec(self):
        c = self.config
        return ModelSpec(
            num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            max_positions=c.max_positions,
            dtype=jnp.dtype(self.dtype),
            windows=c.windows,
        )

    def embed(self, batch):
        return in_order(self.decoder.embed(jnp.asarray(batch.tokens)), batch)

    def embed_tokens(self, tokens):
        return self.decoder.embed(tokens)

    def decode(self, *args):
        return self.decoder(*args)

    def unembed(self, hidden):
        return self.decoder.unembed(hidden)

    def rotate(self, x, positions):
        return self.decoder.rotate(x, positions)


def text_batch(lengths, length, seed=0):
    """Right-padded prompts of random tokens, of which some count as visual, at the same places in every row."""
    tokens = np.random.default_rng(seed).integers(3, 64, (len(lengths), length)).astype(np.int32)
    inside = np.arange(length) < np.asarray(lengths)[:, None]
    index = np.where(inside & (np.arange(length) >= 2) & (np.arange(length) < 12), np.arange(length) - 2, TEXT)
    pixels = np.zeros((len(lengths), 0, 4, 4, 3), np.float32)
    return Batch(np.where(inside, tokens, 0), np.asarray(lengths, np.int32), index.astype(np.int32), pixels)
