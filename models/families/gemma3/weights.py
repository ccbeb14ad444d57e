"""Which tensor of a checkpoint goes where in the parameter tree, as data."""

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.families.names import newest_module, oldest_name
from vlcache_jax.models.io.rules import Rule, WeightRules
from vlcache_jax.models.vision.weights import SIGLIP_HEAD, siglip_rules

_VISION = "vision_tower.vision_model"
_PROJECTOR = "multi_modal_projector"

WEIGHTS = WeightRules(
    rules=(
        *siglip_rules(_VISION),
        Rule(f"{_PROJECTOR}.mm_soft_emb_norm.weight", ("projector", "norm", "scale")),
        Rule(f"{_PROJECTOR}.mm_input_projection_weight", ("projector", "kernel")),  # as it is: [vision, text]
        *decoder_rules("language_model.model", "language_model.lm_head"),
    ),
    rename=oldest_name,
    module=newest_module,
    ignored=frozenset(f"{_VISION}.{name}" for name in SIGLIP_HEAD),
)
