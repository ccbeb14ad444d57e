"""Which tensor of a checkpoint goes where in the parameter tree, as data.

transformers has written LLaVA under several layouts of names. `_rename` turns all of them into one, the
oldest, which every version reads and which `save_params` writes:

    canonical                                    also seen
    language_model.model.norm.weight             model.language_model.norm.weight
    language_model.lm_head.weight                lm_head.weight
    vision_tower.vision_model.encoder. ...       vision_tower.encoder. ..., model.vision_tower. ...
    multi_modal_projector.linear_1.weight        model.multi_modal_projector.linear_1.weight
    image_newline                                model.image_newline
"""

import re

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.io.rules import CONVOLUTION, Rule, WeightRules, layer_norm, linear

_VISION = "vision_tower.vision_model"
_VISION_LAYER = f"{_VISION}.encoder.layers.{{layer}}"
_TEXT = "language_model.model"


def _rename(name: str) -> str:
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", "", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


WEIGHTS = WeightRules(
    rules=(
        Rule(f"{_VISION}.embeddings.class_embedding", ("vision", "class_embedding")),
        Rule(f"{_VISION}.embeddings.patch_embedding.weight", ("vision", "patch_embedding", "kernel"), CONVOLUTION),
        Rule(f"{_VISION}.embeddings.position_embedding.weight", ("vision", "position_embedding")),
        *layer_norm(f"{_VISION}.pre_layrnorm", "vision", "pre_norm"),  # spelt so in the checkpoints
        *layer_norm(f"{_VISION_LAYER}.layer_norm1", "vision", "layers", "norm_1"),
        *linear(f"{_VISION_LAYER}.self_attn.q_proj", "vision", "layers", "attention", "query"),
        *linear(f"{_VISION_LAYER}.self_attn.k_proj", "vision", "layers", "attention", "key"),
        *linear(f"{_VISION_LAYER}.self_attn.v_proj", "vision", "layers", "attention", "value"),
        *linear(f"{_VISION_LAYER}.self_attn.out_proj", "vision", "layers", "attention", "output"),
        *layer_norm(f"{_VISION_LAYER}.layer_norm2", "vision", "layers", "norm_2"),
        *linear(f"{_VISION_LAYER}.mlp.fc1", "vision", "layers", "mlp", "fc1"),
        *linear(f"{_VISION_LAYER}.mlp.fc2", "vision", "layers", "mlp", "fc2"),
        *linear("multi_modal_projector.linear_1", "projector", "linear_1"),
        *linear("multi_modal_projector.linear_2", "projector", "linear_2"),
        Rule("image_newline", ("image_newline",)),
        *decoder_rules(_TEXT, "language_model.lm_head"),
    ),
    rename=_rename,
    ignored=frozenset(
        {
            # After the last layer, where LLaVA takes no features.
            f"{_VISION}.post_layernorm.weight",
            f"{_VISION}.post_layernorm.bias",
            # Buffers that some versions saved; they are computed.
            f"{_VISION}.embeddings.position_ids",
            f"{_TEXT}.rotary_emb.inv_freq",
            f"{_TEXT}.layers.{{layer}}.self_attn.rotary_emb.inv_freq",
        }
    ),
    shortened=frozenset({"vision"}),  # layers behind the one whose features are used
    # transformers has this norm though LLaVA never reaches it; without it loading would warn.
    written=(
        (f"{_VISION}.post_layernorm.weight", ("vision", "pre_norm", "scale"), 1.0),
        (f"{_VISION}.post_layernorm.bias", ("vision", "pre_norm", "bias"), 0.0),
    ),
)
