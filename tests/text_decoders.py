"""Random text decoders of transformers, as configs and parameters of ours."""

import flax.traverse_util
import torch

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig

_PATHS = {
    "input_layernorm": ("input_norm",),
    "post_attention_layernorm": ("post_attention_norm",),
    **{f"self_attn.{x[0]}_proj": ("attention", x) for x in ("query", "key", "value", "output")},
    **{f"mlp.{x}_proj": ("mlp", x) for x in ("gate", "up", "down")},
}


def sharpen(model: torch.nn.Module, size: float = 0.12) -> torch.nn.Module:
    """Weights so large that attention differs from token to token, norms that are not all ones; in eval mode."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = weight.ndim == 1 and "norm" in name
            weight.normal_(float(norm and "gemma" not in type(model).__name__.lower()), 0.1 if norm else size)
    return model.eval()


def decoder_params(model: torch.nn.Module, head: torch.nn.Linear | None, paths: dict = _PATHS) -> dict:
    """Parameters of `Decoder`, layers stacked, from a text model of transformers."""
    flat = {("embed_tokens", "embedding"): model.embed_tokens.weight, ("final_norm", "scale"): model.norm.weight}
    if head is not None:
        flat["lm_head", "kernel"] = head.weight.T
    for name, path in paths.items():
        parts = [dict(layer.get_submodule(name).named_parameters()) for layer in model.layers]
        for kind in parts[0]:
            stacked = torch.stack([part[kind] for part in parts])
            if stacked.ndim == 3:
                flat["layers", *path, "kernel"] = stacked.swapaxes(1, 2)
            else:
                flat["layers", *path, "scale" if kind == "weight" else kind] = stacked
    return flax.traverse_util.unflatten_dict({k: v.detach().numpy().copy() for k, v in flat.items()})


def qwen2_vl(sections=(2, 1, 1), layers=3):
    """(text model, head, `DecoderConfig`, parameters) of a tiny Qwen2-VL's decoder."""
    from transformers import Qwen2VLTextConfig, Qwen2VLTextModel

    torch.manual_seed(0)
    reference = Qwen2VLTextModel(
        Qwen2VLTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)},
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )
    head = torch.nn.Linear(32, 64, bias=False)
    sharpen(reference), sharpen(head)
    config = DecoderConfig(
        family="qwen2",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32 // 4,
        rms_norm_eps=reference.config.rms_norm_eps,
        rope=RopeConfig(theta=1e4, sections=sections),
        max_positions=256,
        qkv_bias=True,
    )
    return reference, head, config, decoder_params(reference, head)
