"""Tiny checkpoint folders with a processor, written by transformers and read back by it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

CORPUS = [
    "USER: What is in this picture? ASSISTANT: A cat and two dogs, near the naïve café.",
    "Describe  the image in   detail.\nHow many objects are there?",
    "I don't know; it's 42 degrees — perhaps. 你好 🙂",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TILE, PATCH = 24, 6
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer of one of the kinds that LLaVA's decoders use (Llama 2, Llama 3 or Qwen), or the simplest one."""
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "llama", fuse_unk=kind == "llama"))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if kind == "llama":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
            alphabet = []
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        special = SPECIAL + ([f"<0x{byte:02X}>" for byte in range(256)] if kind == "llama" else [])
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind != "bytes":  # like Qwen's, this one adds no <s>
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def write_checkpoint(
    folder: Path,
    model_type: str = "llava",
    tokenizer: str = "words",
    *,
    select: str = "default",
    template: str | None = TEMPLATE,
    image_processor: str | None = None,
    tile: int = TILE,
    patch: int = PATCH,
    pinpoints: list[list[int]] = PINPOINTS,
    **image_options: Any,
) -> Any:
    """Writes a processor and a config.json; returns transformers' processor as it reads them back."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    options = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}} | image_options
    if model_type == "llava_next":
        images: Any = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **options)
    else:
        images = (LlavaImageProcessorPil if image_processor == "llava" else CLIPImageProcessorPil)(**options)
    kind = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}[model_type]
    processor = kind(
        image_processor=images,
        tokenizer=wrapped,
        patch_size=patch,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    write_config(
        folder, model_type, len(wrapped), wrapped.convert_tokens_to_ids("<image>"), select, tile, patch, pinpoints
    )
    return kind.from_pretrained(folder)


def write_config(
    folder: Path,
    model_type: str,
    vocab_size: int,
    image_token: int,
    select: str,
    tile: int,
    patch: int,
    pinpoints: list[list[int]],
) -> None:
    """Writes the config.json of a tiny model."""
    vision = CLIPVisionConfig(
        image_size=tile,
        patch_size=patch,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    options: dict[str, Any] = {"image_token_index": image_token, "vision_feature_select_strategy": select}
    if model_type == "llava_next":
        LlavaNextConfig(
            vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints, **options
        ).save_pretrained(folder)
    else:
        LlavaConfig(vision_config=vision, text_config=text, **options).save_pretrained(folder)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture with an edge in it, so that resizing has something to get wrong."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 2 :, : width // 2] //= 2
    return Image.fromarray(pixels)
