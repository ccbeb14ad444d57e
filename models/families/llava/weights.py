"""Which tensor of a checkpoint goes where in the parameter tree, as data."""

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.families.names import oldest_name
from vlcache_jax.models.io.rules import Rule, WeightRules, layer_norm, linear
from vlcache_jax.models.vision.weights import tower_rules

_VISION = "vision_tower.vision_model"
_TEXT = "language_model.model"

WEIGHTS = WeightRules(
    rules=(
        Rule(f"{_VISION}.embeddings.class_embedding", ("vision", "class_embedding")),
        *layer_norm(f"{_VISION}.pre_layrnorm", "vision", "pre_norm"),  # spelt so in the checkpoints
        *tower_rules(_VISION),
        *linear("multi_modal_projector.linear_1", "projector", "linear_1"),
        *linear("multi_modal_projector.linear_2", "projector", "linear_2"),
        Rule("image_newline", ("image_newline",)),
        *decoder_rules(_TEXT, "language_model.lm_head"),
    ),
    rename=oldest_name,
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
