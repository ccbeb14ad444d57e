"""InternVL3 and InternVL3.5 of transformers, without experts: 1B to 14B."""

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.internvl.config import config_values, read_config
from vlcache_jax.models.families.internvl.layout import read_layout, read_videos
from vlcache_jax.models.families.internvl.model import InternVL
from vlcache_jax.models.families.internvl.presets import PRESETS
from vlcache_jax.models.families.internvl.weights import WEIGHTS

_ORIGINAL = (
    "this is an InternVL in the form of its authors' own code: take the same model in the form of transformers, whose "
    "name on the Hugging Face Hub ends in -hf, such as OpenGVLab/InternVL3-8B-hf"
)

INTERNVL = Family(
    model_types=("internvl",),
    read_config=read_config,
    config_values=config_values,
    model=InternVL,
    weights=WEIGHTS,
    read_layout=read_layout,
    read_videos=read_videos,
    image_tiles=lambda config: 13,  # a grid of twelve, and the whole
    presets=PRESETS,
    refused={"internvl_chat": _ORIGINAL},
    special_tokens={"image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"},
)
