"""A tiny random InternVL, made by transformers: a grid of tiles and a thumbnail, 2 x 2 patches a token."""

from pathlib import Path
from typing import Any

import torch
import transformers
from processors_of_transformers import save_without_video, without_video
from text_decoders import TINY, sharpen
from tiny_checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, WORDS, make_tokenizer

NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SIDE, PATCH, TOKENS = 32, 8, 4
MAX_PATCHES = 5
VIDEO = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.4] * 3, "image_std": [0.6] * 3}


def make_tiny_internvl(folder: str | Path, text_config: Any = transformers.Qwen2Config) -> Any:
    """Saves a random InternVL with a decoder of this class; returns the model of transformers."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    words = len(SPECIAL_TOKENS) + len(WORDS)
    text = text_config(
        vocab_size=words + len(NAMED),
        **TINY,
        **tokens,
    )
    vision = transformers.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words + list(NAMED).index("context_image_token"),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpen(transformers.InternVLForConditionalGeneration(config), 0.2)
        with torch.no_grad():
            for layer in model.model.vision_tower.encoder.layer:
                layer.lambda_1.normal_(1.0, 0.3)
                layer.lambda_2.normal_(1.0, 0.3)
    model.generation_config.update(**tokens)
    model.save_pretrained(folder)
    save_without_video(make_processor(), folder, VIDEO)
    return model


def make_processor() -> Any:
    """The processor of `make_tiny_internvl`, with PIL-based image processing."""
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_patches=MAX_PATCHES, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return without_video(transformers.InternVLProcessor)(
        image_processor=images,
        tokenizer=make_tokenizer(NAMED),
        image_seq_length=TOKENS,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )


def frame_processor() -> Any:
    """What makes tiles of the frames of videos."""
    return transformers.GotOcr2ImageProcessorPil(**VIDEO, crop_to_patches=False)
