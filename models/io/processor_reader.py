"""The parts of a processor, read from a checkpoint folder."""

from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.families.registry import family_of, read_config
from vlcache_jax.models.io.files import Folder, checkpoint_folder, optional_json
from vlcache_jax.models.text.chat_template import read_templates
from vlcache_jax.models.text.tokenizer import Tokenizer


def read_parts(path: Folder) -> dict[str, Any]:
    """The arguments of `Processor`, in the forms that transformers 4 and 5 write them.

    Raises CheckpointError: a file is missing or malformed, or the parts do not fit one another.
    """
    folder = checkpoint_folder(path)
    config = read_config(folder)
    settings = optional_json(folder, "processor_config.json") or {}
    source, images = "processor_config.json", settings.get("image_processor")
    if images is None:
        source, images = "preprocessor_config.json", optional_json(folder, "preprocessor_config.json")
    if images is None:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor an image_processor in "
            "processor_config.json: write it with transformers, by "
            "AutoProcessor.from_pretrained(...).save_pretrained(folder)"
        )
    if not isinstance(images, dict):
        raise CheckpointError(f"{folder / source}: image_processor = {images!r} is not an object")
    family = family_of(config)
    layout = family.read_layout(config, images, source)
    if family.read_videos is not None:
        source, videos = "processor_config.json", settings.get("video_processor")
        if videos is None:
            source, videos = "video_preprocessor_config.json", optional_json(folder, "video_preprocessor_config.json")
        if videos is not None and not isinstance(videos, dict):
            raise CheckpointError(f"{folder / source}: video_processor = {videos!r} is not an object")
        layout = layout if videos is None else family.read_videos(layout, videos, source)
    tokenizer = Tokenizer.from_folder(folder, config.eos_token_ids)
    image_token = settings.get("image_token") or family.special_tokens["image_token"]
    if not isinstance(image_token, str):
        raise CheckpointError(f"{folder / 'processor_config.json'}: image_token = {image_token!r} is not a text")
    named = {**family.special_tokens, "image_token": image_token} | tokenizer.special_tokens
    placeholder = named.get(family.placeholder)
    if placeholder is None:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} names no {family.placeholder}, which stands for an image in a prompt: "
            "download it again, or add it"
        )
    return {
        "tokenizer": tokenizer,
        "layout": layout,
        "image_token": placeholder,
        "special_tokens": named,
        "chat_templates": read_templates(folder),
    }
