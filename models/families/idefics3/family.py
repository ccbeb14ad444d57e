"""Idefics3, SmolVLM and SmolVLM2: one graph under two names."""

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.idefics3.config import config_values, read_config
from vlcache_jax.models.families.idefics3.layout import read_layout, with_videos
from vlcache_jax.models.families.idefics3.model import Idefics3
from vlcache_jax.models.families.idefics3.presets import PRESETS
from vlcache_jax.models.families.idefics3.weights import WEIGHTS

IDEFICS3 = Family(
    model_types=("idefics3", "smolvlm"),
    read_config=read_config,
    config_values=config_values,
    model=Idefics3,
    weights=WEIGHTS,
    read_layout=read_layout,
    read_videos=with_videos,
    image_tiles=lambda config: 17,  # of all published models: four by four, and the whole
    presets=PRESETS,
    refused={"idefics2": "this is an Idefics2: take an Idefics3 or a SmolVLM"},
    special_tokens={
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    },
)
