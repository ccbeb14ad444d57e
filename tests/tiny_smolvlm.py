"""A tiny random SmolVLM2, made by transformers: marked tiles, 2 x 2 patches a token."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from processors_of_transformers import save_without_video, without_video
from text_decoders import TINY, sharpen
from tiny_checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, WORDS, make_tokenizer
from transformers.models.smolvlm import processing_smolvlm

SIDE, PATCH, TOKENS, LONGEST = 32, 8, 4, 64
NAMED = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    **{f"mark_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
}
VIDEO = {
    "video_sampling": {"fps": 1, "max_frames": 7, "video_size": {"longest_edge": 48}},
    "image_mean": [0.4] * 3,
    "image_std": [0.6] * 3,
}


def make_tiny_smolvlm(folder: str | Path) -> Any:
    """Saves a random SmolVLM2; returns the model of transformers."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text = transformers.LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS) + len(NAMED) + 2,
        **TINY,
        **tokens,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.SmolVLMVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)
    config = transformers.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=4, scale_factor=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpen(transformers.SmolVLMForConditionalGeneration(config), 0.2)
    model.generation_config.update(**tokens)
    model.save_pretrained(folder)
    save_without_video(make_processor(), folder, VIDEO)
    return model


def make_processor() -> Any:
    """The processor of `make_tiny_smolvlm`, with PIL-based image processing."""
    processing_smolvlm.num2words = {3: "three"}.__getitem__  # of a package that the tests do not install
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": LONGEST}, max_image_size={"longest_edge": SIDE}, image_std=[0.25] * 3
    )
    processor = without_video(transformers.SmolVLMProcessor)(
        image_processor=images,
        tokenizer=make_tokenizer(NAMED, breaks=True),
        image_seq_len=TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    processor.video_processor = SimpleNamespace(num_frames=None, fps=None)  # a chat asks for these two, image or not
    return processor


def frame_processor() -> Any:
    """What makes tiles of the frames of videos."""
    return transformers.SmolVLMImageProcessorPil(
        size=VIDEO["video_sampling"]["video_size"],
        max_image_size={"longest_edge": SIDE},
        image_mean=VIDEO["image_mean"],
        image_std=VIDEO["image_std"],
        do_image_splitting=False,
    )
