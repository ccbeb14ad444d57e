"""Gemma 3 with images: 4B, 12B and 27B."""

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.gemma3.config import config_values, read_config
from vlcache_jax.models.families.gemma3.layout import read_layout
from vlcache_jax.models.families.gemma3.model import Gemma3
from vlcache_jax.models.families.gemma3.presets import PRESETS
from vlcache_jax.models.families.gemma3.weights import WEIGHTS

_TEXT = "this is a Gemma 3 without a vision tower (270M, 1B, or a fine-tune of the text part): take one with images"

GEMMA3 = Family(
    model_types=("gemma3",),
    read_config=read_config,
    config_values=config_values,
    model=Gemma3,
    weights=WEIGHTS,
    read_layout=read_layout,
    image_tiles=lambda config: 1,
    placeholder="boi_token",
    presets=PRESETS,
    refused={"gemma3_text": _TEXT},
)
