"""Which tensor of a checkpoint goes where in the parameter tree, as data.

transformers has written LLaVA under several layouts of names. `canonical` turns all of them into one, the
oldest, which every version reads and which `save_params` writes:

    canonical                                    also seen
    language_model.model.norm.weight             model.language_model.norm.weight
    language_model.lm_head.weight                lm_head.weight
    vision_tower.vision_model.encoder. ...       vision_tower.encoder. ..., model.vision_tower. ...
    multi_modal_projector.linear_1.weight        model.multi_modal_projector.linear_1.weight
    image_newline                                model.image_newline
"""

import re

from vlcache_jax.models.io.rules import CONVOLUTION, LINEAR, Rule


def _linear(name: str, *path: str) -> list[Rule]:
    return [
        Rule(f"{name}.weight", (*path, "kernel"), LINEAR),
        Rule(f"{name}.bias", (*path, "bias")),
    ]


def _layer_norm(name: str, *path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (*path, "scale")), Rule(f"{name}.bias", (*path, "bias"))]


_VISION = "vision_tower.vision_model"
_VISION_LAYER = f"{_VISION}.encoder.layers.{{layer}}"
_TEXT = "language_model.model"
_TEXT_LAYER = f"{_TEXT}.layers.{{layer}}"

RULES: tuple[Rule, ...] = (
    Rule(f"{_VISION}.embeddings.class_embedding", ("vision", "class_embedding")),
    Rule(f"{_VISION}.embeddings.patch_embedding.weight", ("vision", "patch_embedding", "kernel"), CONVOLUTION),
    Rule(f"{_VISION}.embeddings.position_embedding.weight", ("vision", "position_embedding")),
    *_layer_norm(f"{_VISION}.pre_layrnorm", "vision", "pre_norm"),  # spelt so in the checkpoints
    *_layer_norm(f"{_VISION_LAYER}.layer_norm1", "vision", "layers", "norm_1"),
    *_linear(f"{_VISION_LAYER}.self_attn.q_proj", "vision", "layers", "attention", "query"),
    *_linear(f"{_VISION_LAYER}.self_attn.k_proj", "vision", "layers", "attention", "key"),
    *_linear(f"{_VISION_LAYER}.self_attn.v_proj", "vision", "layers", "attention", "value"),
    *_linear(f"{_VISION_LAYER}.self_attn.out_proj", "vision", "layers", "attention", "output"),
    *_layer_norm(f"{_VISION_LAYER}.layer_norm2", "vision", "layers", "norm_2"),
    *_linear(f"{_VISION_LAYER}.mlp.fc1", "vision", "layers", "mlp", "fc1"),
    *_linear(f"{_VISION_LAYER}.mlp.fc2", "vision", "layers", "mlp", "fc2"),
    *_linear("multi_modal_projector.linear_1", "projector", "linear_1"),
    *_linear("multi_modal_projector.linear_2", "projector", "linear_2"),
    Rule("image_newline", ("image_newline",)),
    Rule(f"{_TEXT}.embed_tokens.weight", ("decoder", "embed_tokens", "embedding")),
    Rule(f"{_TEXT_LAYER}.input_layernorm.weight", ("decoder", "layers", "input_norm", "scale")),
    *_linear(f"{_TEXT_LAYER}.self_attn.q_proj", "decoder", "layers", "attention", "query"),
    *_linear(f"{_TEXT_LAYER}.self_attn.k_proj", "decoder", "layers", "attention", "key"),
    *_linear(f"{_TEXT_LAYER}.self_attn.v_proj", "decoder", "layers", "attention", "value"),
    *_linear(f"{_TEXT_LAYER}.self_attn.o_proj", "decoder", "layers", "attention", "output"),
    Rule(
        f"{_TEXT_LAYER}.post_attention_layernorm.weight",
        ("decoder", "layers", "post_attention_norm", "scale"),
    ),
    *_linear(f"{_TEXT_LAYER}.mlp.gate_proj", "decoder", "layers", "mlp", "gate"),
    *_linear(f"{_TEXT_LAYER}.mlp.up_proj", "decoder", "layers", "mlp", "up"),
    *_linear(f"{_TEXT_LAYER}.mlp.down_proj", "decoder", "layers", "mlp", "down"),
    Rule(f"{_TEXT}.norm.weight", ("decoder", "final_norm", "scale")),
    Rule("language_model.lm_head.weight", ("decoder", "lm_head", "kernel"), LINEAR),
)

IGNORED = frozenset(
    {
        # After the last layer, where LLaVA takes no features.
        f"{_VISION}.post_layernorm.weight",
        f"{_VISION}.post_layernorm.bias",
        # Buffers that some versions saved; they are computed.
        f"{_VISION}.embeddings.position_ids",
        f"{_TEXT}.rotary_emb.inv_freq",
        f"{_TEXT_LAYER}.self_attn.rotary_emb.inv_freq",
    }
)
"""Canonical names that hold nothing a model needs."""

BY_NAME = {rule.name: rule for rule in RULES}
BY_PATH = {rule.path: rule for rule in RULES}


def canonical(name: str) -> tuple[str, int | None]:
    """A tensor's name in the canonical layout, its layer number replaced by `{layer}`, and that number."""
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", "", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    match = re.search(r"\.layers\.(0|[1-9][0-9]{0,5})\.", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}.layers.{{layer}}.{name[match.end() :]}", int(match[1])
