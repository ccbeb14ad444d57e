"""Which tensor of a checkpoint goes where in the parameter tree, as data."""

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.io.rules import LINEAR, Rule, WeightRules
from vlcache_jax.models.vision.weights import siglip_rules

WEIGHTS = WeightRules(
    rules=(
        *siglip_rules("model.vision_model"),
        Rule("model.connector.modality_projection.proj.weight", ("projector", "kernel"), LINEAR),
        *decoder_rules("model.text_model", "lm_head"),
    ),
    rename=lambda name: name,  # all versions of transformers use the same names
)
