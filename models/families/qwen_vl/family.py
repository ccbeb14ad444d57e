"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, and videos."""

import dataclasses

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.qwen_vl import weights
from vlcache_jax.models.families.qwen_vl.config import config_values, read_config
from vlcache_jax.models.families.qwen_vl.model import QwenVL
from vlcache_jax.models.families.qwen_vl.presets import QWEN2_PRESETS, QWEN3_PRESETS
from vlcache_jax.models.families.qwen_vl.processor_reader import read_layout, read_videos

_PATCHES = 4 * 1280  # of an image of as many pixels as transformers allows where a checkpoint does not say
_EXPERTS = "this is a Qwen3-VL with experts (such as 30B-A3B): take a dense one, such as 4B or 8B"

QWEN2_VL = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    read_config=read_config,
    config_values=config_values,
    model=QwenVL,
    weights=weights.QWEN2,
    read_layout=read_layout,
    read_videos=read_videos,
    image_tiles=lambda config: _PATCHES,
    token_patches=lambda config: config.vision.merge_size**2,
    presets=QWEN2_PRESETS,
    special_tokens={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
)
QWEN3_VL = dataclasses.replace(
    QWEN2_VL,
    model_types=("qwen3_vl",),
    weights=weights.QWEN3,
    presets=QWEN3_PRESETS,
    refused={"qwen3_vl_moe": _EXPERTS},
)
