"""Tiny random LLaVA checkpoints, complete with tokenizer, image processor and chat template, made by transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

TEXT_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
WORDS = ("user:", "assistant:", *(f"w{i}" for i in range(57)))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
IMAGE_SIZE, PATCH_SIZE = 32, 8  # 16 visual tokens per tile
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def make_tiny_llava(
    folder: str | Path,
    family: str = "llama",
    next: bool = False,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """Saves a random LLaVA that transformers' `AutoProcessor` and `AutoModelForImageTextToText` load, too.

    The vocabulary is `SPECIAL_TOKENS` and `WORDS`, separated by white space; <s> is put in front. An image gives 16
    visual tokens per tile of 32 pixels. Weights are large enough for answers to depend on the image.

    Args:
      folder: created if need be.
      family: decoder: llama, mistral or qwen2.
      next: LLaVA-NeXT instead of LLaVA-1.5.
      chat_template: None for a checkpoint without one.
      text: more arguments of the text config, such as {"num_hidden_layers": 4}.
      vision: more arguments of the vision config.
      top: more arguments of the LLaVA config, such as {"vision_feature_select_strategy": "full"}.
      max_shard_size: of the safetensors files.
      dtype: of the weights.
      seed: of the weights.

    Returns:
      The model of transformers, in eval mode.
    """
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text_config = TEXT_CONFIGS[family](
        **{
            "vocab_size": len(SPECIAL_TOKENS) + len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            **({"sliding_window": None} if family == "mistral" else {}),
            **tokens,
        }
        | (text or {})
    )
    vision_config = transformers.CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        }
        | (vision or {})
    )
    settings = {"vision_config": vision_config, "text_config": text_config, "image_token_index": 4}
    if next:
        settings["image_grid_pinpoints"] = PINPOINTS
    settings |= top or {}
    config = transformers.LlavaNextConfig(**settings) if next else transformers.LlavaConfig(**settings)
    kind = transformers.LlavaNextForConditionalGeneration if next else transformers.LlavaForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 1.0 if "embed_tokens" in name else 1.3 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else scale))
                if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
    model = model.to(dtype).eval()
    model.generation_config.update(**tokens)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_processor(config, next=next, chat_template=chat_template).save_pretrained(folder)
    return model


def make_processor(config: Any, *, next: bool, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """The processor of `make_tiny_llava`, as transformers' own class, with PIL-based image processing."""
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if next:
        pinpoints = [list(pair) for pair in config.image_grid_pinpoints]
        images = transformers.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
    else:
        images = transformers.CLIPImageProcessorPil(**sizes)
    strategy = config.vision_feature_select_strategy
    kind = transformers.LlavaNextProcessor if next else transformers.LlavaProcessor
    return kind(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,  # the class token, which the default strategy takes away again
        chat_template=chat_template,
        image_token="<image>",
    )


def make_tokenizer(more: dict[str, str] | None = None, breaks: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Words separated by white space; <s> in front.

    Args:
      more: special tokens by their names, behind the words.
      breaks: one and two line breaks are tokens, too, behind all others.
    """
    special = tuple(dict.fromkeys((*SPECIAL_TOKENS, *(more or {}).values())))
    lines = ("\n", "\n\n") if breaks else ()
    words = (*SPECIAL_TOKENS, *WORDS, *special[len(SPECIAL_TOKENS) :], *lines)
    vocabulary = {token: i for i, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if breaks:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split(" ", "removed")]
        )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    more = {} if more is None else {"extra_special_tokens": more}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **more)
