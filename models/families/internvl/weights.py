"""Which tensor of a checkpoint goes where in the parameter tree, as data."""

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.families.names import newest_module, oldest_name
from vlcache_jax.models.io.rules import CONVOLUTION, Rule, WeightRules, layer_norm, linear

_VISION = "vision_tower"
_PROJECTOR = "multi_modal_projector"
_LAYER, _OURS = f"{_VISION}.encoder.layer.{{layer}}", ("vision", "layers")


def _rename(name: str) -> str:
    return oldest_name(name).replace("vision_tower.vision_model.", f"{_VISION}.", 1)


WEIGHTS = WeightRules(
    rules=(
        Rule(f"{_VISION}.embeddings.cls_token", ("vision", "class_embedding")),
        Rule(f"{_VISION}.embeddings.position_embeddings", ("vision", "position_embedding")),
        Rule(
            f"{_VISION}.embeddings.patch_embeddings.projection.weight",
            ("vision", "patch_embedding", "kernel"),
            CONVOLUTION,
        ),
        Rule(f"{_VISION}.embeddings.patch_embeddings.projection.bias", ("vision", "patch_embedding", "bias")),
        *layer_norm(f"{_LAYER}.layernorm_before", *_OURS, "norm_1"),
        *linear(f"{_LAYER}.attention.q_proj", *_OURS, "attention", "query"),
        *linear(f"{_LAYER}.attention.k_proj", *_OURS, "attention", "key"),
        *linear(f"{_LAYER}.attention.v_proj", *_OURS, "attention", "value"),
        *linear(f"{_LAYER}.attention.projection_layer", *_OURS, "attention", "output"),
        Rule(f"{_LAYER}.lambda_1", (*_OURS, "scale_1")),
        *layer_norm(f"{_LAYER}.layernorm_after", *_OURS, "norm_2"),
        *linear(f"{_LAYER}.mlp.fc1", *_OURS, "mlp", "fc1"),
        *linear(f"{_LAYER}.mlp.fc2", *_OURS, "mlp", "fc2"),
        Rule(f"{_LAYER}.lambda_2", (*_OURS, "scale_2")),
        *layer_norm(f"{_PROJECTOR}.layer_norm", "projector", "norm"),
        *linear(f"{_PROJECTOR}.linear_1", "projector", "linear_1"),
        *linear(f"{_PROJECTOR}.linear_2", "projector", "linear_2"),
        *decoder_rules("language_model.model", "language_model.lm_head"),
    ),
    rename=_rename,
    module=newest_module,
    ignored=frozenset({f"{_VISION}.embeddings.mask_token"}),
    shortened=frozenset({"vision"}),
)
