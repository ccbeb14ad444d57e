"""Qwen2-VL and Qwen2.5-VL: images of any size; videos are not read yet."""

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.qwen_vl.config_reader import read_config
from vlcache_jax.models.families.qwen_vl.config_writer import config_values
from vlcache_jax.models.families.qwen_vl.layout import read_layout
from vlcache_jax.models.families.qwen_vl.model import QwenVL
from vlcache_jax.models.families.qwen_vl.presets import PRESETS
from vlcache_jax.models.families.qwen_vl.weights import WEIGHTS

_PATCHES = 4 * 1280  # of an image of as many pixels as transformers allows where a checkpoint does not say

QWEN_VL = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    read_config=read_config,
    config_values=config_values,
    model=QwenVL,
    weights=WEIGHTS,
    read_layout=read_layout,
    image_tiles=lambda config: _PATCHES,
    presets=PRESETS,
    special_tokens={"image_token": "<|image_pad|>"},
)
