"""Which tensor of a checkpoint goes where in the parameter tree, as data.

canonical                                    also seen (Qwen2-VL and Qwen2.5-VL on the Hub)
model.visual.blocks. ...                     visual.blocks. ...
model.language_model.layers. ...             model.layers. ...
"""

import re

from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.io.rules import Rule, WeightRules, layer_norm, linear

_VISION = "model.visual"
_BLOCK = f"{_VISION}.blocks.{{layer}}"
_MERGER = f"{_VISION}.merger"
_DEEPSTACK = f"{_VISION}.deepstack_merger_list.{{layer}}"
_TEXT = "model.language_model"
_VIDEO_CONVOLUTION = (1, 2, 3, 4, 0)


def _rename(name: str) -> str:
    name = re.sub(r"^visual\.", f"{_VISION}.", name)
    return re.sub(r"^model\.(?!visual\.|language_model\.)", f"{_TEXT}.", name)


def _with(*tower: Rule) -> WeightRules:
    """The weights of a Qwen-VL: of its tower, what the others do not have, or under other names."""
    return WeightRules(
        rules=(
            Rule(f"{_VISION}.patch_embed.proj.weight", ("vision", "patch_embedding", "kernel"), _VIDEO_CONVOLUTION),
            *layer_norm(f"{_BLOCK}.norm1", "vision", "layers", "norm_1"),
            *linear(f"{_BLOCK}.attn.qkv", "vision", "layers", "attention", "qkv"),
            *linear(f"{_BLOCK}.attn.proj", "vision", "layers", "attention", "output"),
            *layer_norm(f"{_BLOCK}.norm2", "vision", "layers", "norm_2"),
            *tower,
            *decoder_rules(_TEXT, "lm_head"),
        ),
        rename=_rename,
        # Buffers that some versions saved; they are computed.
        ignored=frozenset({f"{_VISION}.rotary_pos_emb.inv_freq", f"{_TEXT}.rotary_emb.inv_freq"}),
    )


QWEN2 = _with(
    *linear(f"{_BLOCK}.mlp.fc1", "vision", "layers", "mlp", "fc1"),  # Qwen2-VL
    *linear(f"{_BLOCK}.mlp.fc2", "vision", "layers", "mlp", "fc2"),
    *linear(f"{_BLOCK}.mlp.gate_proj", "vision", "layers", "mlp", "gate"),  # Qwen2.5-VL
    *linear(f"{_BLOCK}.mlp.up_proj", "vision", "layers", "mlp", "up"),
    *linear(f"{_BLOCK}.mlp.down_proj", "vision", "layers", "mlp", "down"),
    *layer_norm(f"{_MERGER}.ln_q", "vision", "merger", "norm"),
    *linear(f"{_MERGER}.mlp.0", "vision", "merger", "fc1"),
    *linear(f"{_MERGER}.mlp.2", "vision", "merger", "fc2"),
)
QWEN3 = _with(
    Rule(f"{_VISION}.patch_embed.proj.bias", ("vision", "patch_embedding", "bias")),
    Rule(f"{_VISION}.pos_embed.weight", ("vision", "position_embedding")),
    *linear(f"{_BLOCK}.mlp.linear_fc1", "vision", "layers", "mlp", "fc1"),
    *linear(f"{_BLOCK}.mlp.linear_fc2", "vision", "layers", "mlp", "fc2"),
    *layer_norm(f"{_MERGER}.norm", "vision", "merger", "norm"),
    *linear(f"{_MERGER}.linear_fc1", "vision", "merger", "fc1"),
    *linear(f"{_MERGER}.linear_fc2", "vision", "merger", "fc2"),
    *layer_norm(f"{_DEEPSTACK}.norm", "vision", "deepstack", "norm"),
    *linear(f"{_DEEPSTACK}.linear_fc1", "vision", "deepstack", "fc1"),
    *linear(f"{_DEEPSTACK}.linear_fc2", "vision", "deepstack", "fc2"),
)
