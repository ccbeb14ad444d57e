"""Tiny random models and ragged batches, made in memory."""

import jax
import numpy as np

from vlcache_jax.inputs import NEWLINE, TEXT, Batch
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.vision.config import VisionConfig

IMAGE_TOKEN = 5
PATCHES = 16  # visual features of one tile


def tiny_llava(dtype="float32", layers=3, heads=4, kv_heads=2, newline=False, **options):
    """(model, params) whose attention is sharp enough that different caches give different answers."""
    config = LlavaConfig(
        model_type="llava_next" if newline else "llava",
        vision=VisionConfig(
            hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, image_size=16, patch_size=4
        ),
        decoder=DecoderConfig(
            family="llama",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=8,
            max_positions=256,
            **options,
        ),
        image_token_id=IMAGE_TOKEN,
        feature_layers=(1,),
        grid_pinpoints=((16, 16),) if newline else (),
        eos_token_ids=(2,),
        pad_token_id=0,
    )
    model = Llava(config, jax.numpy.dtype(dtype))
    rng = np.random.default_rng(1)

    def draw(path, leaf):  # numpy is far quicker than compiling `model.init`
        name = path[-1].key
        if name == "scale":
            return np.ones(leaf.shape, dtype)
        size = 0.12 if len(leaf.shape) > 2 else 0.02
        return (size * rng.normal(size=leaf.shape)).astype(dtype)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def ragged_batch(rows=3, length=48, seed=0, tiles=2, newline=False):
    """Rows in turn: one image, several images, text only, and a prompt that ends in its image; any lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, 64, (rows, length)).astype(np.int32)
    index = np.full((rows, length), TEXT, np.int32)
    lengths = np.empty(rows, np.int32)
    for row in range(rows):
        images = (1, tiles, 0, 1)[row % 4]
        at = int(rng.integers(1, 4))
        for tile in range(images):
            patches = rng.permutation(PATCHES)[: int(rng.integers(4, PATCHES + 1))] if tile else np.arange(PATCHES)
            patches = patches[: length - at - 6]
            index[row, at : at + len(patches)] = tile * PATCHES + np.sort(patches)
            if newline and len(patches):
                index[row, at + len(patches) - 1] = NEWLINE
            at += len(patches) + 1
        text = 0 if row % 4 == 3 else int(rng.integers(4, max(5, length - at)))
        lengths[row] = min(length, at - 1 + text) if images else int(rng.integers(5, length + 1))
    tokens[index != TEXT] = IMAGE_TOKEN
    pixels = rng.normal(size=(rows, tiles, 16, 16, 3)).astype(np.float32)
    inside = np.arange(length) < lengths[:, None]
    return Batch(np.where(inside, tokens, 0), lengths, np.where(inside, index, TEXT), pixels)


def one_row(batch, row, length=None):
    """Row `row` alone, padded to its own true length or to `length`."""
    length = int(batch.lengths[row]) if length is None else length
    return Batch(
        batch.tokens[row : row + 1, :length],
        batch.lengths[row : row + 1],
        batch.vision_index[row : row + 1, :length],
        batch.pixels[row : row + 1],
    )
