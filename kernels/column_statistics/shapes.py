"""Shapes of real models' attention, by the name of the model."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Query heads, KV heads and head size of a decoder layer."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llava-v1.6-mistral-7b": AttentionShape(32, 8, 128),
    "llava-1.5-7b": AttentionShape(32, 32, 128),
    "llava-v1.6-34b": AttentionShape(56, 8, 128),
    "qwen2.5-vl-7b": AttentionShape(28, 4, 128),
    "qwen2-vl-2b": AttentionShape(12, 2, 128),
    "gemma-3-4b": AttentionShape(8, 4, 256),
    "phi-3.5-vision": AttentionShape(32, 32, 96),
    "phi-2": AttentionShape(32, 32, 80),
    "smolvlm2-500m": AttentionShape(15, 5, 64),
}
