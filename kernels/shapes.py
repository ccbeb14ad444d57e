"""Shapes of real models' attention, by the name of the model: for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Query heads, KV heads and head size of a decoder layer."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llava-1.5-7b": Shape(32, 32, 128),
    "llava-v1.6-mistral-7b": Shape(32, 8, 128),
    "llava-v1.6-34b": Shape(56, 8, 128),
    "smolvlm2-500m": Shape(15, 5, 64),
    "qwen2-0.5b": Shape(14, 2, 64),
    "qwen2-7b": Shape(28, 4, 128),
    "phi-2": Shape(32, 32, 80),
    "phi-3-mini": Shape(32, 32, 96),
    "gemma-2b": Shape(8, 1, 256),
    "gemma-3-4b": Shape(8, 4, 256),
}
