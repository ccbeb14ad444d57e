"""Which tensors hold the parameters of a CLIP or SigLIP tower."""

from vlcache_jax.models.io.rules import CONVOLUTION, Rule, layer_norm, linear


def tower_rules(tower: str) -> tuple[Rule, ...]:
    """The rules of what both kinds have: patches, positions and layers.

    Args:
      tower: what the names of transformers begin with, such as "vision_tower.vision_model".
    """
    layer, ours = f"{tower}.encoder.layers.{{layer}}", ("vision", "layers")
    return (
        Rule(f"{tower}.embeddings.patch_embedding.weight", ("vision", "patch_embedding", "kernel"), CONVOLUTION),
        Rule(f"{tower}.embeddings.position_embedding.weight", ("vision", "position_embedding")),
        *layer_norm(f"{layer}.layer_norm1", *ours, "norm_1"),
        *linear(f"{layer}.self_attn.q_proj", *ours, "attention", "query"),
        *linear(f"{layer}.self_attn.k_proj", *ours, "attention", "key"),
        *linear(f"{layer}.self_attn.v_proj", *ours, "attention", "value"),
        *linear(f"{layer}.self_attn.out_proj", *ours, "attention", "output"),
        *layer_norm(f"{layer}.layer_norm2", *ours, "norm_2"),
        *linear(f"{layer}.mlp.fc1", *ours, "mlp", "fc1"),
        *linear(f"{layer}.mlp.fc2", *ours, "mlp", "fc2"),
    )


def siglip_rules(tower: str, final_norm: bool = True) -> tuple[Rule, ...]:
    """The rules of a SigLIP tower, with or without its last norm."""
    norm = layer_norm(f"{tower}.post_layernorm", "vision", "post_norm") if final_norm else []
    return (
        *tower_rules(tower),
        Rule(f"{tower}.embeddings.patch_embedding.bias", ("vision", "patch_embedding", "bias")),
        *norm,
    )


SIGLIP_HEAD = (
    "head.probe",
    *(f"head.attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"head.{layer}.{kind}" for layer in ("layernorm", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
    "embeddings.position_ids",
)
"""What some checkpoints hold of a SigLIP tower and no language model reads: its pooling head, and a buffer."""
