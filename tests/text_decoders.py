"""Random text decoders of transformers, as configs and parameters of ours."""

import flax.traverse_util
import torch

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""Sizes of the decoders of whole tiny models."""

_PATHS = {
    "input_layernorm": ("input_norm",),
    "post_attention_layernorm": ("post_attention_norm",),
    **{f"self_attn.{x[0]}_proj": ("attention", x) for x in ("query", "key", "value", "output")},
    **{f"mlp.{x}_proj": ("mlp", x) for x in ("gate", "up", "down")},
}

_GEMMA = {
    "self_attn.q_norm": ("attention", "query_norm"),
    "self_attn.k_norm": ("attention", "key_norm"),
    "pre_feedforward_layernorm": ("pre_mlp_norm",),
    "post_feedforward_layernorm": ("post_mlp_norm",),
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


def gemma3(layers=7, window=9, **options):
    """(causal model of transformers, `DecoderConfig`, parameters) of a tiny Gemma 3: every third layer sees all."""
    from transformers import Gemma3ForCausalLM

    text, config = _gemma3_configs(layers, window, **options)
    torch.manual_seed(0)
    reference = sharpen(Gemma3ForCausalLM(text))
    return reference, config, decoder_params(reference.model, None, _PATHS | _GEMMA)


def gemma3_with_images(window, layers=7):
    """`gemma3` as transformers' model with images, for its masks: of the vision tower nothing is used."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text, config = _gemma3_configs(layers, window)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    whole = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_id=63)
    whole._attn_implementation = "eager"
    reference = sharpen(Gemma3ForConditionalGeneration(whole))
    return reference, config, decoder_params(reference.model.language_model, None, _PATHS | _GEMMA)


def _gemma3_configs(layers, window, **options):
    from transformers import Gemma3TextConfig

    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=window,
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
        rope_parameters=ropes,
        max_position_embeddings=256,
        attn_implementation="eager",
        **options,
    )
    config = DecoderConfig(
        family="gemma3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeConfig(theta=1e5, kind="linear", factor=8.0),
        window_rope=RopeConfig(theta=1e4),
        windows=tuple(None if i % 3 == 2 else window for i in range(layers)),
        max_positions=256,
        tie_embeddings=True,
        activation="gelu_pytorch_tanh",
        qk_norm=True,
        branch_norms=True,
        one_plus_norms=True,
        embedding_scale=32**0.5,
        query_scale=24**-0.5,
        logit_cap=options.get("final_logit_softcapping"),
    )
    return text, config
