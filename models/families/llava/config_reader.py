"""Reading `config.json` as transformers 4 and 5 write it for LLaVA."""

import re
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
from vlcache_jax.models.vision.config_reader import SIGLIP_DEFAULTS, read_vision


def read_config(root: CheckpointFolder, top: Section) -> LlavaConfig:
    """See `Family.read_config`."""
    model_type = top.get("model_type")
    onevision = model_type == "llava_onevision"
    text = text_section(top, "qwen2" if onevision else "llama")
    vision_type, vision, feature_layers = _vision(top, onevision)
    decoder = read_decoder(text, _is_tied(root, model_type, top, text))
    tokens = read_token_ids(root, top, text, decoder.vocab_size)
    return LlavaConfig(
        model_type=model_type,
        vision=vision,
        decoder=decoder,
        image_token_id=read_image_token(top, decoder.vocab_size, 151646 if onevision else 32000),
        feature_layers=feature_layers,
        vision_type=vision_type,
        feature_select=_feature_select(top, vision_type, onevision),
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(top, vision, onevision) if model_type != "llava" else (),
        max_tiles=_max_tiles(top) if onevision else None,
        video_token_id=next(iter(top.token_ids("video_token_index")), 151647) if onevision else None,
        **tokens,
    )


def _vision(top: Section, onevision: bool) -> tuple[str, VisionConfig, tuple[int, ...]]:
    classes = {"clip_vision_model": defaults.VISION_DEFAULTS, "siglip_vision_model": SIGLIP_DEFAULTS}
    usual = "siglip_vision_model" if onevision else "clip_vision_model"
    supported = [usual] if onevision else list(classes)
    vision_type = top.section("vision_config").choice("model_type", usual, supported)
    absent = defaults.ONEVISION_ABSENT if onevision else defaults.VISION_ABSENT
    section = top.section("vision_config", classes[vision_type] | (absent if top.get("vision_config") is None else {}))
    layers = section.integer("num_hidden_layers", LAYERS)
    value = top.get("vision_feature_layer", -1 if onevision else -2)
    wanted = value if isinstance(value, list) else [value]
    few = 0 < len(wanted) <= FEATURE_LAYERS
    if not few or not all(type(i) is int and -layers - 1 <= i <= layers for i in wanted):
        expected = f"one or more of {-layers - 1}..{layers}, the hidden states of {layers} vision layers"
        expected += "" if few or not wanted else f", but at most {FEATURE_LAYERS} of them"
        raise top.error("vision_feature_layer", value, expected)
    feature_layers = tuple(i if i >= 0 else layers + 1 + i for i in wanted)
    return (
        vision_type,
        read_vision(section, max(feature_layers), remainder=vision_type == "siglip_vision_model"),
        feature_layers,
    )


def _feature_select(top: Section, vision_type: str, onevision: bool) -> str:
    key = "vision_feature_select_strategy"
    value = top.choice(key, "full" if onevision else "default", ("default", "full"))
    if value == "default" and vision_type == "siglip_vision_model":
        raise top.error(key, value, '"full": a SigLIP tower has no class token that "default" could leave out')
    return value


def _max_tiles(top: Section) -> int:
    value = top.get("vision_aspect_ratio", "anyres_max_9")
    match = re.fullmatch(r"anyres_max_([1-9]\d{0,2})", value) if isinstance(value, str) else None
    if match is None or int(match[1]) > TILES:
        raise top.error("vision_aspect_ratio", value, f'"anyres_max_9", or with another number up to {TILES}')
    return int(match[1])


def _is_tied(folder: CheckpointFolder, model_type: str, top: Section, text: Section) -> bool:
    """Whether the output head is the embedding table: for all but LLaVA-NeXT either level says so."""
    outer, inner = top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False)
    return read_tied(folder, outer, inner) if model_type == "llava_next" else outer or inner


def _pinpoints(top: Section, vision: VisionConfig, onevision: bool) -> tuple[tuple[int, int], ...]:
    value = top.get("image_grid_pinpoints")
    if value is None:
        return defaults.ONEVISION_PINPOINTS if onevision else defaults.PINPOINTS
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
