"""Reading the text config of a `config.json`, as transformers 4 and 5 write it for Llama, Mistral and Qwen2."""

from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.limits import CHANNELS, EPSILON, HEAD_SIZE, HEADS, LAYERS, POSITIONS, VOCABULARY, Range
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.decoder.rope_reader import read_rope, read_rope_of_axes
from vlcache_jax.models.io.files import CheckpointFolder, file_inside, read_json
from vlcache_jax.models.io.section import Section
from vlcache_jax.models.io.weights_folder import SafetensorsFolder

# What the configuration classes of transformers fill in for keys a config.json lacks.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
        "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
        "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip


def text_section(top: Section, default: str = "llama") -> Section:
    """The text config within a `config.json`, with what its class (`default`, if none is named) fills in."""
    family = top.section("text_config").choice("model_type", default, TEXT_DEFAULTS)
    return top.section("text_config", TEXT_DEFAULTS[family] | {"model_type": family})


def read_tied(root: CheckpointFolder, outer: bool, inner: bool) -> bool:
    """Whether the output head is the embedding table, as the top level of `config.json` and its text config say.

    transformers 4 and 5 go by different ones, and both write both: where they disagree only the weights can tell.
    """
    if outer == inner:
        return outer
    try:
        names = SafetensorsFolder(root).tensors
    except CheckpointError:
        return outer  # there may be no weights yet; reading them will tell what is wrong
    return not any(name.endswith("lm_head.weight") for name in names)


def read_text(root: CheckpointFolder, top: Section, text: Section, tied: bool, image_token: int) -> dict[str, Any]:
    """The decoder and the tokens of a `ModelConfig`, by field; `image_token` is the id where the file names none."""
    decoder = read_decoder(text, tied)
    size = decoder.vocab_size
    image = read_image_token(top, size, image_token)
    return {"decoder": decoder, "image_token_id": image, **read_token_ids(root, top, text, size)}


def read_sizes(text: Section) -> dict[str, Any]:
    """The fields of a `DecoderConfig` that every text config has alike. Raises CheckpointError."""
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
    return {
        "vocab_size": text.integer("vocab_size", VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": text.integer("intermediate_size", CHANNELS),
        "num_layers": text.integer("num_hidden_layers", LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": text.number("rms_norm_eps", EPSILON, 1e-6),
        "max_positions": text.integer("max_position_embeddings", POSITIONS),
    }


def read_decoder(
    text: Section,
    tie_embeddings: bool,
    sections: tuple[int, int, int] | None = None,
    interleaved: bool = False,
) -> DecoderConfig:
    """The decoder that `text_section` found.

    Args:
      text: its config.
      tie_embeddings: whether the output head is the embedding table.
      sections, interleaved: of rotary positions on three axes, if the model has them: see `read_rope_of_axes`.

    Raises CheckpointError for what is malformed or not supported.
    """
    family, sizes = text.get("model_type"), read_sizes(text)
    head_dim, max_positions = sizes["head_dim"], sizes["max_positions"]
    if sections is None:
        rope = read_rope(text, max_positions)
    else:
        rope = read_rope_of_axes(text, head_dim, sections, interleaved)
    if rope.kind == "dynamic" and head_dim == 2:
        raise text.error("head_dim", head_dim, "more than 2: dynamic rope scaling divides by head_dim - 2")
    _refuse_sliding_window(family, text, sizes["num_layers"], rope.extended(max_positions))
    attention_bias = family in ("llama", "qwen3") and text.flag("attention_bias", False)
    return DecoderConfig(
        family=family,
        rope=rope,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and text.flag("mlp_bias", False),
        tie_embeddings=tie_embeddings,
        activation=text.activation("hidden_act", "silu"),
        qk_norm=family == "qwen3",
        **sizes,
    )


def read_image_token(top: Section, vocab_size: int, default: int) -> int:
    """The id of a visual token, under its older or its newer name. Raises CheckpointError if it has no embedding."""
    key = "image_token_id" if "image_token_id" in top.values else "image_token_index"
    found = top.get(key, default)
    if type(found) is not int or not 0 <= found < vocab_size:
        raise top.error(key, found, f"a token id below the vocab_size {vocab_size}")
    return found


def _refuse_sliding_window(family: str, text: Section, layers: int, max_positions: int) -> None:
    """A window that never reaches its limit is no window; any other is refused."""
    if family == "llama" or text.get("sliding_window") is None:
        return
    if family in ("qwen2", "qwen3"):
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


def read_token_ids(root: CheckpointFolder, top: Section, text: Section, vocab_size: int) -> dict[str, Any]:
    """The fields bos_token_id, pad_token_id and eos_token_ids of a config.

    `generation_config.json` says so if there is one and it does, else the top level, else the text config.
    """
    sections = [top, text]
    if root.has("generation_config.json"):
        path = file_inside(root, "generation_config.json")
        sections.insert(0, Section(path, "", read_json(path), {}))

    def token(key: str) -> tuple[int, ...]:
        for section in sections:
            ids = section.token_ids(key)
            if ids and key == "eos_token_id" and min(ids) >= vocab_size:
                raise section.error(
                    key, section.get(key), f"an id below the vocab_size {vocab_size}, or no answer could end"
                )
            if ids:
                return ids
        return ()

    return {
        "bos_token_id": next(iter(token("bos_token_id")), None),
        "pad_token_id": next(iter(token("pad_token_id")), None),
        "eos_token_ids": token("eos_token_id"),
    }
