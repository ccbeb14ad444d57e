"""What a LLaVA is made of, and its `config.json` as transformers 4 and 5 write it."""

import dataclasses
import re
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import (
    FEATURE_LAYERS,
    IMAGE_SIDE,
    LAYERS,
    PINPOINTS,
    TILES,
)
from vlcache_jax.models.decoder.config_reader import read_text, read_tied, text_section
from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import SIGLIP_DEFAULTS, VisionConfig, read_vision, vision_values


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig(ModelConfig):
    """LLaVA-1.5 (`llava`), LLaVA-NeXT (`llava_next`) or LLaVA-OneVision (`llava_onevision`).

    `feature_layers` index the tower's hidden states: 0 is the embedding, i the output of layer i; the last one
    equals `vision.num_layers`. Several layers are concatenated along the channels.
    """

    vision: VisionConfig
    feature_layers: tuple[int, ...]
    vision_type: str = "clip_vision_model"  # or "siglip_vision_model", which has no class token
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_activation: str = "gelu"
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels; not of LLaVA-1.5
    max_tiles: int | None = None  # LLaVA-OneVision: more tiles than these are shrunk to the area of so many
    video_token_id: int | None = None  # LLaVA-OneVision

    @property
    def has_class_token(self) -> bool:
        """Whether a class token is among the features of a tile."""
        return self.vision_type == "clip_vision_model" and self.feature_select == "full"

    @property
    def features_per_tile(self) -> int:
        """Visual features the tower yields for one tile."""
        return self.vision.grid_size**2 + (1 if self.has_class_token else 0)


ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
# Not the class's defaults but what LLaVA takes if `vision_config` is absent as a whole: CLIP ViT-L/14-336.
VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
# Likewise of LLaVA-OneVision: SigLIP So400m/14-384 without its last layer.
ONEVISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

# What the classes of image processors fill in, where it differs from CLIP's.
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "SiglipImageProcessor": {"do_center_crop": False, "size": {"height": 224, "width": 224}} | HALF,
    "LlavaOnevisionImageProcessor": {"do_center_crop": False, "size": {"height": 384, "width": 384}},
}


def read_config(root: CheckpointFolder, top: Section) -> LlavaConfig:
    """See `Family.read_config`."""
    model_type = top.get("model_type")
    onevision = model_type == "llava_onevision"
    text = text_section(top, "qwen2" if onevision else "llama")
    vision_type, vision, feature_layers = _vision(top, onevision)
    tied, image_token = _is_tied(root, model_type, top, text), 151646 if onevision else 32000
    return LlavaConfig(
        model_type=model_type,
        vision=vision,
        feature_layers=feature_layers,
        vision_type=vision_type,
        feature_select=_feature_select(top, vision_type, onevision),
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(top, vision, onevision) if model_type != "llava" else (),
        max_tiles=_max_tiles(top) if onevision else None,
        video_token_id=next(iter(top.token_ids("video_token_index")), 151647) if onevision else None,
        **read_text(root, top, text, tied, image_token),
    )


def _vision(top: Section, onevision: bool) -> tuple[str, VisionConfig, tuple[int, ...]]:
    classes = {"clip_vision_model": VISION_DEFAULTS, "siglip_vision_model": SIGLIP_DEFAULTS}
    usual = "siglip_vision_model" if onevision else "clip_vision_model"
    supported = [usual] if onevision else list(classes)
    vision_type = top.section("vision_config").choice("model_type", usual, supported)
    absent = ONEVISION_ABSENT if onevision else VISION_ABSENT
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
        return ONEVISION_PINPOINTS if onevision else NEXT_PINPOINTS
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


def config_values(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`.

    It describes the vision layers that are run, so that `read_config` returns an equal config.

    Raises:
      CheckpointError: the decoder has biases that its family cannot have.
    """
    single = len(config.feature_layers) == 1
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "dtype": dtype,
        "image_seq_length": config.features_per_tile,
        "image_token_index": config.image_token_id,
        "model_type": config.model_type,
        "multimodal_projector_bias": config.projector_bias,
        "projector_hidden_act": config.projector_activation,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, config.vision_type),
        "vision_feature_layer": -1 if single else list(config.feature_layers),
        "vision_feature_select_strategy": config.feature_select,
    }
    if config.vision_type == "siglip_vision_model":
        values["vision_config"]["vision_use_head"] = False
    if config.grid_pinpoints:
        values["image_grid_pinpoints"] = [list(pair) for pair in config.grid_pinpoints]
    if config.max_tiles is not None:
        values |= {"vision_aspect_ratio": f"anyres_max_{config.max_tiles}", "video_token_index": config.video_token_id}
    return values
