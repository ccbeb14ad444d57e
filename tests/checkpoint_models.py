"""Tiny random LLaVAs of transformers, and their parameters in our tree, written out by hand for the tests.

Deliberately no use of the loader or of its mapping: a mistake there must not hide here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TEXT = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}
MODELS = {
    "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
    "llava_next": (transformers.LlavaNextConfig, transformers.LlavaNextForConditionalGeneration),
}


def make_config(model_type: str, family: str, text: dict | None = None, **top: Any) -> Any:
    """A tiny transformers config; vision images are 16 pixels wide."""
    text_config = TEXT[family](
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        | (text or {})
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    if model_type == "llava_next":
        top.setdefault("image_grid_pinpoints", [[16, 32], [32, 16], [32, 32]])
    return MODELS[model_type][0](vision_config=vision, text_config=text_config, image_token_index=60, **top)


def make_model(
    model_type: str, family: str, text: dict | None = None, dtype: torch.dtype = torch.float32, **top: Any
) -> Any:
    """A tiny model whose every parameter is random (norm scales of one would hide mistakes)."""
    torch.manual_seed(0)
    model = MODELS[model_type][1](make_config(model_type, family, text, **top)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
    return model


def hand_built(model: Any, vision_layers: int = 2) -> dict[str, Any]:
    """The parameters of a transformers model in our tree, float32 numpy."""
    config = model.config
    w = {name: p.detach().float().numpy() for name, p in model.named_parameters()}

    def linear(name: str) -> dict[str, np.ndarray]:
        tree = {"kernel": w[f"{name}.weight"].T}
        if f"{name}.bias" in w:
            tree["bias"] = w[f"{name}.bias"]
        return tree

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def stack(trees: list[dict]) -> dict:
        first = trees[0]
        if not isinstance(first, dict):
            return np.stack(trees)
        return {key: stack([tree[key] for tree in trees]) for key in first}

    v, t = "model.vision_tower", "model.language_model"
    vision = [
        {
            "norm_1": norm(f"{v}.encoder.layers.{i}.layer_norm1"),
            "attention": {
                ours: linear(f"{v}.encoder.layers.{i}.self_attn.{theirs}")
                for ours, theirs in (
                    ("query", "q_proj"),
                    ("key", "k_proj"),
                    ("value", "v_proj"),
                    ("output", "out_proj"),
                )
            },
            "norm_2": norm(f"{v}.encoder.layers.{i}.layer_norm2"),
            "mlp": {n: linear(f"{v}.encoder.layers.{i}.mlp.{n}") for n in ("fc1", "fc2")},
        }
        for i in range(vision_layers)
    ]
    decoder = [
        {
            "input_norm": {"scale": w[f"{t}.layers.{i}.input_layernorm.weight"]},
            "attention": {
                ours: linear(f"{t}.layers.{i}.self_attn.{theirs}")
                for ours, theirs in (
                    ("query", "q_proj"),
                    ("key", "k_proj"),
                    ("value", "v_proj"),
                    ("output", "o_proj"),
                )
            },
            "post_attention_norm": {"scale": w[f"{t}.layers.{i}.post_attention_layernorm.weight"]},
            "mlp": {n: linear(f"{t}.layers.{i}.mlp.{n}_proj") for n in ("gate", "up", "down")},
        }
        for i in range(config.text_config.num_hidden_layers)
    ]
    tree: dict[str, Any] = {
        "vision": {
            "patch_embedding": {"kernel": w[f"{v}.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
            "class_embedding": w[f"{v}.embeddings.class_embedding"],
            "position_embedding": w[f"{v}.embeddings.position_embedding.weight"],
            "pre_norm": norm(f"{v}.pre_layrnorm"),
            "layers": stack(vision),
        },
        "projector": {n: linear(f"model.multi_modal_projector.{n}") for n in ("linear_1", "linear_2")},
        "decoder": {
            "embed_tokens": {"embedding": w[f"{t}.embed_tokens.weight"]},
            "layers": stack(decoder),
            "final_norm": {"scale": w[f"{t}.norm.weight"]},
        },
    }
    if "lm_head.weight" in w:  # absent when tied: named_parameters lists a shared one once
        tree["decoder"]["lm_head"] = {"kernel": w["lm_head.weight"].T}
    if config.model_type == "llava_next":
        tree["image_newline"] = w["model.image_newline"]
    return tree


def rename(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors with every tensor called `change(name)`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
