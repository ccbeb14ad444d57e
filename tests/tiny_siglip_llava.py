"""Tiny random LLaVAs with a SigLIP tower, LLaVA-OneVision among them, made by transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from processors_of_transformers import save_without_video, without_video
from text_decoders import TINY, sharpen
from tiny_checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, WORDS, make_tokenizer

SIDE, PATCH, GRID = 34, 8, 4  # two pixels beyond the last patch
PINPOINTS = [[34 * rows, 34 * columns] for rows in range(1, 4) for columns in range(1, 4)]
MAX_TILES = 2
VIDEO = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.4] * 3, "image_std": [0.6] * 3, "num_frames": 3}


def make_tiny_siglip_llava(folder: str | Path, onevision: bool = True, **top: Any) -> Any:
    """Saves a random LLaVA-OneVision, or LLaVA-1.5, with a SigLIP tower and a Qwen2 decoder.

    Args:
      folder: created if need be.
      onevision: LLaVA-OneVision, whose fine tiles are shrunk to the features of two.
      top: more arguments of the config.

    Returns:
      The model of transformers.
    """
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    words = len(SPECIAL_TOKENS) + len(WORDS)
    text = transformers.Qwen2Config(
        vocab_size=words + (1 if onevision else 0),
        **TINY,
        **tokens,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    settings = {"vision_config": vision, "text_config": text, "image_token_index": 4}
    if onevision:
        settings |= {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": f"anyres_max_{MAX_TILES}"}
        settings |= {"video_token_index": words}
        kind, config = transformers.LlavaOnevisionForConditionalGeneration, transformers.LlavaOnevisionConfig
    else:
        settings |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        kind, config = transformers.LlavaForConditionalGeneration, transformers.LlavaConfig
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpen(kind(config(**settings | top)))
    model.generation_config.update(**tokens)
    model.save_pretrained(folder)
    save_without_video(make_processor(onevision), folder, VIDEO if onevision else None)
    return model


def make_processor(onevision: bool = True) -> Any:
    """The processor of `make_tiny_siglip_llava`, with PIL-based image processing."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    tokenizer = make_tokenizer({"video_token": "<video>"} if onevision else None)
    parts = {"tokenizer": tokenizer, "chat_template": CHAT_TEMPLATE, "vision_feature_select_strategy": "full"}
    if not onevision:
        images = transformers.SiglipImageProcessorPil(**half, resample=3)
        return transformers.LlavaProcessor(
            image_processor=images, patch_size=PATCH, num_additional_image_tokens=0, **parts
        )
    return without_video(transformers.LlavaOnevisionProcessor)(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(**half, image_grid_pinpoints=PINPOINTS),
        num_image_tokens=GRID**2,
        vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
        **parts,
    )


def frame_processor() -> Any:
    """What makes tiles of the frames of videos."""
    size, mean, std = (VIDEO[key] for key in ("size", "image_mean", "image_std"))
    return transformers.SiglipImageProcessorPil(size=size, image_mean=mean, image_std=std, resample=3)
