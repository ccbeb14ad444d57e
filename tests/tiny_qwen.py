"""Tiny random Qwen-VL checkpoints, complete with tokenizer, image processor and chat template, made by transformers."""

import json

import numpy as np
import torch
import transformers
from PIL import Image
from text_decoders import sharpen
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
IMAGE, VIDEO = 5, 6
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PATCH = 4
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of image_processor(), too
LIMITS = {"shortest_edge": 64, "longest_edge": 3000}  # pixels; a visual token is a square of 8


def make_tiny_qwen(folder, kind="qwen2_5_vl", seed=0, **top):
    """Saves a model of transformers, which is returned, and all that its processor needs."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 3, "num_heads": 4, "patch_size": PATCH}
    if kind == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": text["rope_parameters"] | {"mrope_section": [3, 3, 2]}}
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 36}
        vision["deepstack_visual_indexes"] = [0, 2]
        make, model = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    elif kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        make, model = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
        make, model = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = make(text_config=text, vision_config=vision, **ids | top)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reference = sharpen(model(config), 0.2)
    reference.generation_config.update(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    reference.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    of_video = {"size": LIMITS, "patch_size": PATCH, "image_mean": MEAN, "image_std": STD}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(of_video))
    return reference


def image_processor():
    return transformers.Qwen2VLImageProcessorPil(size=LIMITS, patch_size=PATCH)


def backend():
    words = ("user", "assistant", *(f"w{i}" for i in range(51)), "seconds>", "<0.2", "<1.2", "<2.0")
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIAL, *words))}, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def tokenizer():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
    )


def reference_inputs(text, images):
    """What transformers' processor makes of a prompt, its placeholders repeated by its own rule."""
    inputs = dict(image_processor()(images, return_tensors="pt")) if images else {}
    pieces = text.split("<|image_pad|>")
    counts = [int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", [])]
    text = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    types = (ids == IMAGE).int()
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


def pictures(seed=0):
    """Of many shapes: small, wide, tall, one with a window that is cut, one larger than the limit."""
    rng = np.random.default_rng(seed)
    shapes = ((40, 50), (9, 61), (71, 17), (33, 33), (120, 90))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


SHOWN = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_TEXTS = {
    "a video between texts": f"w1 w2 {SHOWN} w3 w4",
    "an image and two videos": f"<|vision_start|><|image_pad|><|vision_end|> w1 {SHOWN} w2 {SHOWN}",
}
"""Prompts with videos, of which `expected_videos.py` wrote down what transformers 4.57 makes."""


def clips(seed=1):
    """Frames u8 [n, height, width, 3] of two videos, of five (one is missing for a pair) and of four frames."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (5, 16, 24, 3), dtype=np.uint8), rng.integers(0, 256, (4, 24, 16, 3), dtype=np.uint8)]
