"""Writing the demo's checkpoint as a Hugging Face folder, and its example images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlcache_jax.demo.assets import QUESTIONS
from vlcache_jax.demo.data.samples import FULL_GRID, IMAGE_MEAN, IMAGE_STD, PATCH, make_sample
from vlcache_jax.demo.data.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, UNKNOWN, build_tokenizer
from vlcache_jax.files.writing import make_folder, write_picture, write_text
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.layout import VisionLayout
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.io.saving import save
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import Tokenizer

EXAMPLES = (
    ("document", "documents", 1, 0),
    ("document", "documents", 2, 0),
    ("scene", "scenes", 3, 1),
    ("math", "prices", 4, 1),
    ("two pages", "document_pairs", 5, 0),
    ("place", "places", 6, 1),
)
"""(task as the demo names it, task, sample, question) of the example images."""

EXAMPLES_SEED = 2_000_003


def export_demo(params: dict[str, Any], config: LlavaConfig, folder: Path) -> None:
    """Writes the whole checkpoint: weights in float32, configs, tokenizer, template."""
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD, "image_token": IMAGE}
    side = FULL_GRID * PATCH
    transform = ImageTransform(size=side, crop_size=(side, side), mean=(IMAGE_MEAN,) * 3, std=(IMAGE_STD,) * 3)
    processor = Processor(
        tokenizer=Tokenizer(build_tokenizer(), special, config.eos_token_ids),
        layout=VisionLayout(config, transform),
        image_token=IMAGE,
        chat_templates={"default": CHAT_TEMPLATE},
    )
    save(VLM(Llava(config), params, processor, config), folder)


def write_examples(folder: Path) -> None:
    """Writes `EXAMPLES` as PNG files with a `questions.json`."""
    make_folder(folder)
    entries = []
    for name, task, index, number in EXAMPLES:
        sample = make_sample(task, EXAMPLES_SEED, index)
        files = [
            f"{name.replace(' ', '_')}_{index}{letter}.png" for letter in ("ab" if len(sample.images) > 1 else [""])
        ]
        for file, pixels in zip(files, sample.images, strict=True):
            # Fewer shades of the paper's grain: half the bytes.
            picture = Image.fromarray(pixels // 8 * 8 + 4).quantize(64, dither=Image.Dither.NONE)
            write_picture(folder / file, picture)
        question, answer = sample.questions[number]
        entries.append({"task": name, "images": files, "question": question, "answer": answer})
    write_text(folder / QUESTIONS, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
