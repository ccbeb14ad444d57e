"""A processor's files, for a checkpoint folder that transformers 5 and `Processor.from_folder` read."""

import json
import re
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import NAMED_TOKENS

_PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
_IMAGE_PROCESSORS = {"llava": "CLIPImageProcessor", "llava_next": "LlavaNextImageProcessor"}
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def processor_files(processor: Processor) -> dict[str, str]:
    """The texts of the files, by their paths in the folder.

    Raises:
      InputError: a chat template's name cannot be that of a file.
    """
    config = processor.config
    kind = _PROCESSORS[config.model_type]
    files = {
        "tokenizer.json": processor.tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": _json(_tokenizer_values(processor) | {"processor_class": kind}),
        "preprocessor_config.json": _json(_image_values(processor) | {"processor_class": kind}),
        "processor_config.json": _json(
            {
                "processor_class": kind,
                "image_token": processor.image_token,
                "num_additional_image_tokens": 1,  # the class token, which the default strategy takes away again
                "patch_size": config.vision.patch_size,
                "vision_feature_select_strategy": config.feature_select,
            }
        ),
    }
    for name, template in processor.chat_templates.items():
        if name == "default":
            files["chat_template.jinja"] = template
        elif _TEMPLATE_NAME.fullmatch(name):
            files[f"additional_chat_templates/{name}.jinja"] = template
        else:
            raise InputError(f"the chat template {name[:100]!r} cannot be a file: give it a name of letters and digits")
    return files


def _tokenizer_values(processor: Processor) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    named = tokenizer.special_tokens | {"image_token": processor.image_token}
    return {
        **{name: token for name, token in named.items() if name in NAMED_TOKENS},
        "extra_special_tokens": {name: token for name, token in named.items() if name not in NAMED_TOKENS},
        "clean_up_tokenization_spaces": False,
        "model_max_length": processor.config.decoder.max_positions,
        "padding_side": "left",
        "split_special_tokens": tokenizer.backend.encode_special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is
    }


def _image_values(processor: Processor) -> dict[str, Any]:
    transform: ImageTransform = processor.layout.transform
    size, crop = transform.size, transform.crop_size
    values: dict[str, Any] = {
        "image_processor_type": _IMAGE_PROCESSORS[processor.config.model_type],
        "do_convert_rgb": True,
        "do_resize": transform.do_resize,
        "size": {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]},
        "resample": int(transform.resample),
        "do_center_crop": transform.do_center_crop,
        "crop_size": {"height": crop[0], "width": crop[1]},
        "do_rescale": transform.do_rescale,
        "rescale_factor": transform.rescale_factor,
        "do_normalize": transform.do_normalize,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    if transform.pad_to_square:
        values |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if processor.config.model_type == "llava_next":
        values["image_grid_pinpoints"] = [list(pair) for pair in processor.config.grid_pinpoints]
    return values


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
