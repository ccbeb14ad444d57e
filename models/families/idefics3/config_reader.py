"""Reading `config.json` as transformers 4 and 5 write it for Idefics3, SmolVLM and SmolVLM2."""

from vlcache_jax.files.limits import LAYERS, PATCHES_A_SIDE, Range
from vlcache_jax.models.decoder.config_reader import (
    read_decoder,
    read_image_token,
    read_tied,
    read_token_ids,
    text_section,
)
from vlcache_jax.models.families.idefics3.config import Idefics3Config
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config_reader import read_vision

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
    decoder = read_decoder(text, tied)
    top.defaults["scale_factor"] = 2
    shuffle = top.integer("scale_factor", Range(1, PATCHES_A_SIDE))
    if vision.grid_size % shuffle:
        expected = f"a divisor of the {vision.grid_size} patches along a side of a tile"
        raise top.error("scale_factor", shuffle, expected)
    return Idefics3Config(
        model_type=top.get("model_type"),
        vision=vision,
        decoder=decoder,
        image_token_id=read_image_token(top, decoder.vocab_size, 128257),
        shuffle=shuffle,
        **read_token_ids(root, top, text, decoder.vocab_size),
    )
