"""Which tensors hold the parameters of a decoder."""

from vlcache_jax.models.io.rules import LINEAR, Rule, linear


def decoder_rules(text: str, head: str) -> tuple[Rule, ...]:
    """The rules of a decoder, as transformers names its tensors.

    Args:
      text: what the names of the text model begin with, such as "language_model.model".
      head: the name of the output head's tensor without its ".weight".
    """
    layer = f"{text}.layers.{{layer}}"
    ours = ("decoder", "layers")
    return (
        Rule(f"{text}.embed_tokens.weight", ("decoder", "embed_tokens", "embedding")),
        Rule(f"{layer}.input_layernorm.weight", (*ours, "input_norm", "scale")),
        *linear(f"{layer}.self_attn.q_proj", *ours, "attention", "query"),
        *linear(f"{layer}.self_attn.k_proj", *ours, "attention", "key"),
        *linear(f"{layer}.self_attn.v_proj", *ours, "attention", "value"),
        *linear(f"{layer}.self_attn.o_proj", *ours, "attention", "output"),
        Rule(f"{layer}.self_attn.q_norm.weight", (*ours, "attention", "query_norm", "scale")),
        Rule(f"{layer}.self_attn.k_norm.weight", (*ours, "attention", "key_norm", "scale")),
        Rule(f"{layer}.post_attention_layernorm.weight", (*ours, "post_attention_norm", "scale")),
        Rule(f"{layer}.pre_feedforward_layernorm.weight", (*ours, "pre_mlp_norm", "scale")),
        Rule(f"{layer}.post_feedforward_layernorm.weight", (*ours, "post_mlp_norm", "scale")),
        *linear(f"{layer}.mlp.gate_proj", *ours, "mlp", "gate"),
        *linear(f"{layer}.mlp.up_proj", *ours, "mlp", "up"),
        *linear(f"{layer}.mlp.down_proj", *ours, "mlp", "down"),
        Rule(f"{text}.norm.weight", ("decoder", "final_norm", "scale")),
        Rule(f"{head}.weight", ("decoder", "lm_head", "kernel"), LINEAR),
    )
