"""Reading `config.json` as transformers 4 and 5 write it for LLaVA."""

from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.limits import (
    CHANNELS,
    EPSILON,
    FEATURE_LAYERS,
    HEAD_SIZE,
    HEADS,
    IMAGE_SIDE,
    LAYERS,
    PATCHES_A_SIDE,
    PINPOINTS,
    POSITIONS,
    TILES,
    VOCABULARY,
    Range,
)
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.decoder.rope_reader import read_rope
from vlcache_jax.models.families.llava import defaults
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.io.files import CheckpointFolder, Folder, checkpoint_folder, file_inside, read_json
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.io.unsupported import no_config, refuse_quantised
from vlcache_jax.models.io.weights_folder import SafetensorsFolder
from vlcache_jax.models.vision.config import VisionConfig


def read_config(folder: Folder) -> LlavaConfig:
    """What a checkpoint folder's `config.json` (and `generation_config.json`, if any) describes.

    Raises:
      CheckpointError: if a file is missing or malformed, or describes a model that is not supported; the
        message names the key, the value and what is supported.
    """
    root = checkpoint_folder(folder)
    if not root.has("config.json"):
        raise no_config(root)
    path = file_inside(root, "config.json")
    top = Section(path, "", read_json(path), {})
    model_type = _model_type(top)
    refuse_quantised(path, top.values)
    refuse_quantised(path, top.section("text_config").values)
    family = top.section("text_config").choice("model_type", "llama", defaults.TEXT_DEFAULTS)
    text = top.section("text_config", defaults.TEXT_DEFAULTS[family])
    vision, feature_layers = _vision(top)
    decoder = _decoder(family, text, _is_tied(root, model_type, top, text))

    generation = text
    if root.has("generation_config.json"):
        path = file_inside(root, "generation_config.json")
        generation = Section(path, "", read_json(path), {})

    def token(key: str) -> tuple[int, ...]:
        for section in (generation, top, text):
            ids = section.token_ids(key)
            if ids and key == "eos_token_id" and min(ids) >= decoder.vocab_size:
                raise section.error(
                    key, section.get(key), f"an id below the vocab_size {decoder.vocab_size}, or no answer could end"
                )
            if ids:
                return ids
        return ()

    image_key = "image_token_id" if "image_token_id" in top.values else "image_token_index"
    image_token = top.get(image_key, 32000)
    if type(image_token) is not int or not 0 <= image_token < decoder.vocab_size:
        raise top.error(image_key, image_token, f"a token id below the vocab_size {decoder.vocab_size}")

    return LlavaConfig(
        model_type=model_type,
        vision=vision,
        decoder=decoder,
        image_token_id=image_token,
        feature_layers=feature_layers,
        feature_select=top.choice("vision_feature_select_strategy", "default", ("default", "full")),
        projector_activation=top.activation("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
        grid_pinpoints=_pinpoints(top, vision) if model_type == "llava_next" else (),
        bos_token_id=next(iter(token("bos_token_id")), None),
        pad_token_id=next(iter(token("pad_token_id")), None),
        eos_token_ids=token("eos_token_id"),
    )


def _model_type(top: Section) -> str:
    original = str(top.get("model_type")).lower() in ("llava_llama", "llava_mistral", "llava_qwen", "llava_qwen2")
    hint = (
        "; this is a checkpoint in the form of LLaVA's own code: take the same model in the form of transformers, as "
        "the llava-hf organisation on the Hugging Face Hub publishes it"
    )
    return top.choice("model_type", "", defaults.ARCHITECTURES, hint if original else "")


def _vision(top: Section) -> tuple[VisionConfig, tuple[int, ...]]:
    absent = top.get("vision_config") is None
    section = top.section("vision_config", defaults.VISION_DEFAULTS | (defaults.VISION_ABSENT if absent else {}))
    section.choice("model_type", "clip_vision_model", ["clip_vision_model"])
    if section.integer("num_channels", CHANNELS) != 3:
        raise section.error("num_channels", section.get("num_channels"), "3 (RGB images)")

    layers = section.integer("num_hidden_layers", LAYERS)
    value = top.get("vision_feature_layer", -2)
    wanted = value if isinstance(value, list) else [value]
    few = 0 < len(wanted) <= FEATURE_LAYERS
    if not few or not all(type(i) is int and -layers - 1 <= i <= layers for i in wanted):
        expected = f"one or more of {-layers - 1}..{layers}, the hidden states of {layers} vision layers"
        expected += "" if few or not wanted else f", but at most {FEATURE_LAYERS} of them"
        raise top.error("vision_feature_layer", value, expected)
    feature_layers = tuple(i if i >= 0 else layers + 1 + i for i in wanted)

    image_size, patch_size = section.square("image_size"), section.square("patch_size")
    if image_size < patch_size:
        raise section.error("image_size", image_size, f"at least the patch_size {patch_size}")
    if image_size % patch_size:
        raise section.error("image_size", image_size, f"a multiple of the patch_size {patch_size}")
    if image_size // patch_size > PATCHES_A_SIDE:
        raise section.error("patch_size", patch_size, f"at most {PATCHES_A_SIDE} patches along {image_size} pixels")
    vision = VisionConfig(
        hidden_size=section.integer("hidden_size", CHANNELS),
        intermediate_size=section.integer("intermediate_size", CHANNELS),
        num_layers=max(feature_layers),
        num_heads=section.integer("num_attention_heads", HEADS),
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=section.number("layer_norm_eps", EPSILON),
        activation=section.activation("hidden_act", "quick_gelu"),
    )
    if vision.hidden_size % vision.num_heads:
        raise section.error("hidden_size", vision.hidden_size, f"a multiple of {vision.num_heads} heads")
    return vision, feature_layers


def _decoder(family: str, text: Section, tie_embeddings: bool) -> DecoderConfig:
    hidden, heads = text.integer("hidden_size", CHANNELS), text.integer("num_attention_heads", HEADS)
    kv_heads = heads if text.get("num_key_value_heads") is None else text.integer("num_key_value_heads", HEADS)
    if heads % kv_heads:
        raise text.error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    if text.get("head_dim") is not None:
        head_dim = text.integer("head_dim", HEAD_SIZE)
    elif hidden % heads:
        raise text.error("hidden_size", hidden, f"a multiple of the {heads} attention heads (or a head_dim)")
    else:
        head_dim = hidden // heads
    if head_dim not in HEAD_SIZE:
        raise text.error("num_attention_heads", heads, f"heads whose size (hidden_size / heads) is {HEAD_SIZE}")
    if head_dim % 2:
        raise text.error("head_dim", head_dim, "an even number: rotary positions turn pairs of channels")

    layers = text.integer("num_hidden_layers", LAYERS)
    max_positions = text.integer("max_position_embeddings", POSITIONS)
    rope = read_rope(text, max_positions)
    if rope.kind == "dynamic" and head_dim == 2:
        raise text.error("head_dim", head_dim, "more than 2: dynamic rope scaling divides by head_dim - 2")
    _refuse_sliding_window(family, text, layers, rope.extended(max_positions))
    attention_bias = family == "llama" and text.flag("attention_bias", False)
    return DecoderConfig(
        family=family,
        vocab_size=text.integer("vocab_size", VOCABULARY),
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size", CHANNELS),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", EPSILON, 1e-6),
        rope=rope,
        max_positions=max_positions,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and text.flag("mlp_bias", False),
        tie_embeddings=tie_embeddings,
        activation=text.activation("hidden_act", "silu"),
    )


def _refuse_sliding_window(family: str, text: Section, layers: int, max_positions: int) -> None:
    """A window that never reaches its limit is no window; any other is refused."""
    if family == "llama" or text.get("sliding_window") is None:
        return
    if family == "qwen2":
        if not text.flag("use_sliding_window", False):
            return
        kinds = text.get("layer_types")
        if kinds is not None and not isinstance(kinds, list):
            raise text.error("layer_types", kinds, "a list with the kind of each layer")
        windowed = (
            "sliding_attention" in kinds if kinds else text.integer("max_window_layers", Range(0, 2**31)) < layers
        )
        if not windowed:
            return
    window = text.integer("sliding_window", Range(1, 2**31))
    if window < max_positions:
        raise text.error(
            "sliding_window",
            window,
            f"null, or at least the {max_positions} positions of the model: sliding-window attention is not "
            "supported. If no prompt will be longer than the window, lower max_position_embeddings to it",
        )


def _is_tied(folder: CheckpointFolder, model_type: str, top: Section, text: Section) -> bool:
    """Whether the output head is the embedding table.

    For LLaVA either level says so. For LLaVA-NeXT transformers 4 went by the text config and 5 goes by the
    top level, and both write both: where they disagree only the weights can tell.
    """
    outer, inner = top.flag("tie_word_embeddings", False), text.flag("tie_word_embeddings", False)
    if outer == inner or model_type == "llava":
        return outer or inner
    try:
        names = SafetensorsFolder(folder).tensors
    except CheckpointError:
        return outer  # there may be no weights yet; reading them will tell what is wrong
    return not any(name.endswith("lm_head.weight") for name in names)


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
