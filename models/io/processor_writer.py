"""A processor's files, for a checkpoint folder that transformers 5 and `Processor.from_folder` read."""

import json
import re
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import NAMED_TOKENS

_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def processor_files(processor: Processor) -> dict[str, str]:
    """The texts of the files, by their paths in the folder.

    Raises:
      InputError: a chat template's name cannot be that of a file.
    """
    of_layout = processor.layout.files(processor.visual_token)
    kind = {"processor_class": of_layout["processor_config.json"]["processor_class"]}
    files = {
        "tokenizer.json": processor.tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": _json(_tokenizer_values(processor) | kind),
        **{name: _json(values) for name, values in of_layout.items()},
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
    named = {name: x for name, x in processor.special_tokens.items() if tokenizer.token_to_id(x) is not None}
    return {
        **{name: token for name, token in named.items() if name in NAMED_TOKENS},
        "extra_special_tokens": {name: token for name, token in named.items() if name not in NAMED_TOKENS},
        "clean_up_tokenization_spaces": False,
        "model_max_length": processor.config.decoder.max_positions,
        "padding_side": "left",
        "split_special_tokens": tokenizer.backend.encode_special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
