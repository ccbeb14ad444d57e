"""A tiny random Gemma 3 checkpoint, made by transformers: tokenizer, image processor and chat template included."""

from pathlib import Path
from typing import Any

import torch
import transformers
from text_decoders import sharpen
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>",
)  # fmt: skip
WORDS = (*("\n" * n for n in range(1, 7)), "user", "model", "Be", "kind", *(f"w{i}" for i in range(39)))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SIDE, PATCH, TOKENS = 16, 2, 16  # 8 x 8 patches, averaged to 4 x 4
WINDOW = 12  # shorter than an image
NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def make_tiny_gemma3(folder: str | Path, text: dict[str, Any] | None = None, **top: Any) -> Any:
    """Saves a random Gemma 3 of three layers, two of them with windows; returns the model of transformers.

    Args:
      folder: created if need be.
      text: more arguments of the text config.
      top: more arguments of the config.
    """
    ids = {token: number for number, token in enumerate(SPECIAL)}
    text_config = {
        "vocab_size": len(SPECIAL) + len(WORDS) + 6,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 512,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    } | (text or {})
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        **{
            "text_config": text_config,
            "vision_config": vision_config,
            "mm_tokens_per_image": TOKENS,
            "image_token_index": ids["<image_soft_token>"],
            "boi_token_index": ids["<start_of_image>"],
            "eoi_token_index": ids["<end_of_image>"],
        }
        | top
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpen(transformers.Gemma3ForConditionalGeneration(config))
        with torch.no_grad():  # an image matters as much as a text
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 1.0)
    model.generation_config.update(bos_token_id=2, eos_token_id=[1, ids["<end_of_turn>"]], pad_token_id=0)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return model


def make_processor() -> transformers.Gemma3Processor:
    """The processor of `make_tiny_gemma3`, with PIL-based image processing."""
    images = transformers.Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.Gemma3Processor(
        image_processor=images, tokenizer=make_tokenizer(), chat_template=TEMPLATE, image_seq_length=TOKENS
    )


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words, and runs of line breaks as single tokens, as Gemma has them; <bos> in front."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, extra_special_tokens=NAMED)
