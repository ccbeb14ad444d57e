"""What an Idefics3 is made of, and its `config.json` as transformers 4 and 5 write it."""

import dataclasses
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import LAYERS, PATCHES_A_SIDE, Range
from vlcache_jax.models.decoder.config_reader import read_text, read_tied, text_section
from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import VisionConfig, read_vision, vision_values


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class Idefics3Config(ModelConfig):
    """Idefics3 and SmolVLM (`idefics3`), SmolVLM2 (`smolvlm`).

    `shuffle` divides the patches along a side of a tile; so many squared become one token.
    """

    vision: VisionConfig
    shuffle: int = 2

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.vision.grid_size // self.shuffle


# What the configuration class of transformers fills in; no published model has all of these.
_VISION_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_TOWERS = ("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm")


def read_config(root: CheckpointFolder, top: Section) -> Idefics3Config:
    """See `Family.read_config`."""
    text, section = text_section(top), top.section("vision_config", _VISION_DEFAULTS)
    section.choice("model_type", _TOWERS[0], _TOWERS)
    vision = read_vision(section, section.integer("num_hidden_layers", LAYERS), remainder=True)
    tied = read_tied(root, top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False))
    top.defaults["scale_factor"] = 2
    shuffle = top.integer("scale_factor", Range(1, PATCHES_A_SIDE))
    if vision.grid_size % shuffle:
        expected = f"a divisor of the {vision.grid_size} patches along a side of a tile"
        raise top.error("scale_factor", shuffle, expected)
    return Idefics3Config(
        model_type=top.get("model_type"),
        vision=vision,
        shuffle=shuffle,
        **read_text(root, top, text, tied, image_token=128257),
    )


NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
"""What the names of transformers' classes begin with."""


def config_values(config: Idefics3Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`; `read_config` reads it back."""
    return {
        "architectures": [f"{NAMES[config.model_type]}ForConditionalGeneration"],
        "dtype": dtype,
        "image_token_id": config.image_token_id,
        "model_type": config.model_type,
        "scale_factor": config.shuffle,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, f"{config.model_type}_vision"),
    }
