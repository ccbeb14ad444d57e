"""Which tensor of a checkpoint goes where in the parameter tree, as data."""

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.families.names import newest_module, oldest_name
from vlcache_jax.models.io.rules import Rule, WeightRules, layer_norm, linear
from vlcache_jax.models.vision.weights import SIGLIP_HEAD, siglip_rules

_VISION = "vision_tower.vision_model"
_TEXT = "language_model.model"

WEIGHTS = WeightRules(
    rules=(
        Rule(f"{_VISION}.embeddings.class_embedding", ("vision", "class_embedding")),
        *layer_norm(f"{_VISION}.pre_layrnorm", "vision", "pre_norm"),  # spelt so in the checkpoints
        *siglip_rules(_VISION, final_norm=False),  # and CLIP's
        *linear("multi_modal_projector.linear_1", "projector", "linear_1"),
        *linear("multi_modal_projector.linear_2", "projector", "linear_2"),
        Rule("image_newline", ("image_newline",)),
        *decoder_rules(_TEXT, "language_model.lm_head"),
    ),
    rename=oldest_name,
    module=newest_module,
    ignored=frozenset(
        {
            # After the last layer, where LLaVA takes no features.
            f"{_VISION}.post_layernorm.weight",
            f"{_VISION}.post_layernorm.bias",
            *(f"{_VISION}.{name}" for name in SIGLIP_HEAD),
            # Buffers that some versions saved; they are computed.
            f"{_TEXT}.rotary_emb.inv_freq",
            f"{_TEXT}.layers.{{layer}}.self_attn.rotary_emb.inv_freq",
        }
    ),
    shortened=frozenset({"vision"}),  # layers behind the one whose features are used
    # transformers has this norm though LLaVA never reaches it; without it loading would warn.
    written=tuple(
        (f"{_VISION}.post_layernorm.{name}", ("vision", *like), value)
        for like in (("pre_norm", "scale"), ("patch_embedding", "bias"))  # CLIP's and SigLIP's, of the same shape
        for name, value in (("weight", 1.0), ("bias", 0.0))
    ),
)
