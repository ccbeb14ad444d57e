"""Reading `config.json` as transformers 4 and 5 write it for LLaVA."""

from typing import Any

from vlcache_jax.files.limits import (
    FEATURE_LAYERS,
    IMAGE_SIDE,
    LAYERS,
    PINPOINTS,
    TILES,
)
from vlcache_jax.models.decoder.config_reader import (
    read_decoder,
    read_image_token,
    read_tied,
    read_token_ids,
    text_section,
)
from vlcache_jax.models.families.llava import defaults
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.config_reader import read_vision


def read_config(root: CheckpointFolder, top: Section) -> LlavaConfig:
    """What a checkpoint folder's `config.json` (`top`) and `generation_config.json`, if any, describe.

    Raises:
      CheckpointError: if it is malformed, or describes a model that is not supported; the message names the key, the
        value and what is supported.
    """
    model_type, text = top.get("model_type"), text_section(top)
    vision, feature_layers = _vision(top)
    decoder = read_decoder(text, _is_tied(root, model_type, top, text))
    tokens = read_token_ids(root, top, text, decoder.vocab_size)
    return LlavaConfig(
        model_type=model_type,
        vision=vision,
        decoder=decoder,
        image_token_id=read_image_token(top, decoder.vocab_size, 32000),
        feature_layers=feature_layers,
        feature_select=top.choice("vision_feature_select_strategy", "default", ("default", "full")),
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(top, vision) if model_type == "llava_next" else (),
        **tokens,
    )


def _vision(top: Section) -> tuple[VisionConfig, tuple[int, ...]]:
    absent = top.get("vision_config") is None
    section = top.section("vision_config", defaults.VISION_DEFAULTS | (defaults.VISION_ABSENT if absent else {}))
    section.choice("model_type", "clip_vision_model", ["clip_vision_model"])
    layers = section.integer("num_hidden_layers", LAYERS)
    value = top.get("vision_feature_layer", -2)
    wanted = value if isinstance(value, list) else [value]
    few = 0 < len(wanted) <= FEATURE_LAYERS
    if not few or not all(type(i) is int and -layers - 1 <= i <= layers for i in wanted):
        expected = f"one or more of {-layers - 1}..{layers}, the hidden states of {layers} vision layers"
        expected += "" if few or not wanted else f", but at most {FEATURE_LAYERS} of them"
        raise top.error("vision_feature_layer", value, expected)
    feature_layers = tuple(i if i >= 0 else layers + 1 + i for i in wanted)
    return read_vision(section, max(feature_layers)), feature_layers


def _is_tied(folder: CheckpointFolder, model_type: str, top: Section, text: Section) -> bool:
    """Whether the output head is the embedding table: for LLaVA either level says so."""
    outer, inner = top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False)
    return (outer or inner) if model_type == "llava" else read_tied(folder, outer, inner)


def _pinpoints(top: Section, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    value = top.get("image_grid_pinpoints")
    if value is None:
        return defaults.PINPOINTS
    size = vision.image_size

    def fits(pair: Any) -> bool:
        return (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(side) is int and side in IMAGE_SIDE and side % size == 0 for side in pair)
            and pair[0] // size * (pair[1] // size) <= TILES
        )

    if not isinstance(value, list) or not 0 < len(value) <= PINPOINTS or not all(fits(pair) for pair in value):
        expected = (
            f"a list of [height, width] in pixels, multiples of the vision image_size {size} (at most {PINPOINTS} of "
            f"them, each of at most {IMAGE_SIDE.most} pixels a side and {TILES} tiles)"
        )
        raise top.error("image_grid_pinpoints", value, expected)
    return tuple((height, width) for height, width in value)
