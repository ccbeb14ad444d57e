"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision with a Llama, Mistral or Qwen2 decoder."""

from vlcache_jax.models.families.family import Family
from vlcache_jax.models.families.llava.config import LlavaConfig, config_values, read_config
from vlcache_jax.models.families.llava.layout import read_layout, read_videos
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.llava.presets import PRESETS
from vlcache_jax.models.families.llava.weights import WEIGHTS

_ORIGINAL = (
    "this is a checkpoint in the form of LLaVA's own code: take the same model in the form of transformers, as the "
    "llava-hf organisation on the Hugging Face Hub publishes it"
)


def _image_tiles(config: LlavaConfig) -> int:
    side = config.vision.image_size
    return 1 + max((height // side * (width // side) for height, width in config.grid_pinpoints), default=0)


LLAVA = Family(
    model_types=("llava", "llava_next", "llava_onevision"),
    read_config=read_config,
    config_values=config_values,
    model=Llava,
    weights=WEIGHTS,
    read_layout=read_layout,
    read_videos=read_videos,
    image_tiles=_image_tiles,
    presets=PRESETS,
    refused=dict.fromkeys(("llava_llama", "llava_mistral", "llava_qwen", "llava_qwen2"), _ORIGINAL),
)
