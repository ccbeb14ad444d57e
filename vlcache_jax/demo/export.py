"""Writing the demo's checkpoint as a Hugging Face folder, and its example images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlcache_jax.demo.samples import FULL_GRID, IMAGE_MEAN, IMAGE_STD, PATCH, make_sample
from vlcache_jax.demo.tokenizer import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, UNKNOWN, build_tokenizer
from vlcache_jax.models.checkpoint.save import save_params
from vlcache_jax.models.config import LlavaConfig
from vlcache_jax.models.config_reader import write_config
from vlcache_jax.writing import make_folder, write_picture, write_text

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
    """Writes everything transformers and `vlcache_jax.load` read: weights in float32, configs, tokenizer, template."""
    make_folder(folder)
    write_config(config, folder)
    save_params(params, folder, config)
    write_text(folder / "tokenizer.json", build_tokenizer().to_str(pretty=True))
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD, "image_token": IMAGE}
    _write(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "extra_special_tokens": {"image_token": IMAGE},
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.decoder.max_positions,
            "padding_side": "left",
        },
    )
    _write(folder / "special_tokens_map.json", special)
    side = FULL_GRID * PATCH
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [IMAGE_MEAN] * 3,
            "image_std": [IMAGE_STD] * 3,
        },
    )
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": config.feature_select,
        },
    )
    write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)


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
    _write(folder / "questions.json", entries)


def _write(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
