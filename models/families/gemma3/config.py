"""What a Gemma 3 is made of, and its `config.json` as transformers 4 and 5 write it."""

import dataclasses
import math
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import LAYERS, Range
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.decoder.config_reader import read_image_token, read_sizes, read_token_ids
from vlcache_jax.models.decoder.config_writer import rope_values, size_values, token_values
from vlcache_jax.models.decoder.rope_reader import read_ropes_by_kind
from vlcache_jax.models.decoder.window_reader import read_windows
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.vision.config import SIGLIP_DEFAULTS, VisionConfig, read_vision, vision_values


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(ModelConfig):
    """Gemma 3 (`gemma3`). `tokens_per_image` is a square number whose root divides the tower's patches along a side."""

    model_type: str = "gemma3"
    vision: VisionConfig
    start_token_id: int  # before an image; it also stands for one in a prompt
    end_token_id: int
    tokens_per_image: int = 256

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of an image."""
        return math.isqrt(self.tokens_per_image)

    @property
    def features_per_tile(self) -> int:
        """Visual features of one image."""
        return self.tokens_per_image


# What the configuration class of transformers fills in.
_TEXT_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_WINDOW, _PERIOD = 4096, 6  # likewise
_SCALAR = Range(1e-6, 1e6)


def read_config(root: CheckpointFolder, top: Section) -> Gemma3Config:
    """See `Family.read_config`."""
    text = top.section("text_config", _TEXT_DEFAULTS)
    tied = top.flag("tie_word_embeddings", True)
    if text.flag("tie_word_embeddings", tied) != tied:
        raise text.error("tie_word_embeddings", not tied, f"{str(tied).lower()}, as tie_word_embeddings beside it")
    vision, decoder = _vision(top), _decoder(text, tied)
    patches = vision.grid_size
    tokens = top.get("mm_tokens_per_image", 256)
    if type(tokens) is not int or tokens < 1 or math.isqrt(tokens) ** 2 != tokens or patches % math.isqrt(tokens):
        expected = f"the square of a whole number that divides the {patches} patches along a side of an image"
        raise top.error("mm_tokens_per_image", tokens, expected)
    marks = {"boi_token_index": 255999, "eoi_token_index": 256000}
    for key, default in marks.items():
        marks[key] = top.get(key, default)
        if type(marks[key]) is not int or not 0 <= marks[key] < decoder.vocab_size:
            raise top.error(key, marks[key], f"a token id below the vocab_size {decoder.vocab_size}")
    return Gemma3Config(
        vision=vision,
        decoder=decoder,
        image_token_id=read_image_token(top, decoder.vocab_size, 262144),
        start_token_id=marks["boi_token_index"],
        end_token_id=marks["eoi_token_index"],
        tokens_per_image=tokens,
        **read_token_ids(root, top, text, decoder.vocab_size),
    )


def _vision(top: Section) -> VisionConfig:
    section = top.section("vision_config", SIGLIP_DEFAULTS)
    section.choice("model_type", "siglip_vision_model", ["siglip_vision_model"])
    return read_vision(section, section.integer("num_hidden_layers", LAYERS))


def _decoder(text: Section, tied: bool) -> DecoderConfig:
    text.choice("model_type", "gemma3_text", ["gemma3_text"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if text.get(key) is not None:
            raise text.error(key, text.get(key), "null: Gemma 3 with images has no cap on logits")
    if text.get("use_bidirectional_attention"):
        raise text.error("use_bidirectional_attention", True, "false: a model that generates text")
    sizes = read_sizes(text)
    windows = read_windows(text, sizes["num_layers"], _PERIOD, _WINDOW)
    if None not in windows:
        raise text.error("layer_types", text.get("layer_types"), "at least one layer of full_attention")
    rope, window_rope = read_ropes_by_kind(text, sizes["max_positions"])
    biased = text.flag("attention_bias", False)
    return DecoderConfig(
        family="gemma3_text",
        rope=_extended(rope, sizes["max_positions"]),
        window_rope=window_rope,
        windows=windows,
        qkv_bias=biased,
        output_bias=biased,
        tie_embeddings=tied,
        activation=text.activation("hidden_activation", "gelu_pytorch_tanh"),
        qk_norm=True,
        branch_norms=True,
        one_plus_norms=True,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        query_scale=text.number("query_pre_attn_scalar", _SCALAR) ** -0.5,
        **sizes,
    )


def _extended(rope: RopeConfig, max_positions: int) -> RopeConfig:
    # Other models with linear scaling say how many positions they had before it, Gemma 3 how many it has with it.
    if rope.kind != "linear":
        return rope
    return dataclasses.replace(rope, original_max_positions=max(1, int(max_positions / rope.factor)))


def config_values(config: Gemma3Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights transformers shall load as `dtype`; `read_config` reads it back."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": config.start_token_id,
        "dtype": dtype,
        "eoi_token_index": config.end_token_id,
        "image_token_index": config.image_token_id,
        "mm_tokens_per_image": config.tokens_per_image,
        "model_type": config.model_type,
        "text_config": _text_values(config) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_values(config.vision, "siglip_vision_model") | {"vision_use_head": False},
    }


def _text_values(config: Gemma3Config) -> dict[str, Any]:
    decoder = config.decoder
    ropes = {"full_attention": decoder.rope, "sliding_attention": decoder.window_rope or decoder.rope}
    scalar = (decoder.query_scale or decoder.head_dim**-0.5) ** -2
    return size_values(decoder) | {
        "attention_bias": decoder.qkv_bias,
        "hidden_activation": decoder.activation,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in decoder.windows],
        "model_type": decoder.family,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "rope_parameters": {kind: rope_values(rope) for kind, rope in ropes.items()},
        "sliding_window": next((window for window in decoder.windows if window is not None), None),
    }
