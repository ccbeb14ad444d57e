"""The TPU's compiler takes splash attention as the op calls it, at the shapes of real models."""

import jax
import jax.numpy as jnp
import pytest
from tiers import cases
from tpu import compile_for, shape, temporaries

from vlcache_jax.kernels.attention import Mask, attention
from vlcache_jax.kernels.shapes import SHAPES

CHIPS = ["v5e:2x2", *(pytest.param(chip, marks=pytest.mark.thorough) for chip in ("v5p:2x2x1", "v6e:2x2"))]
# One model for each head size: the kernel depends on nothing else of the model.
MODELS = list({shape.head_dim: name for name, shape in SHAPES.items()}.values())


def arguments(model, length, batch=1, dtype="bfloat16"):
    heads, kv_heads, head_dim = SHAPES[model]
    return [shape(batch, length, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
def test_splash_attention(model, chip):
    program = compile_for(chip, lambda *x: attention(*x, implementation="splash_tpu"), *arguments(model, 2880))
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize(("length", "dtype"), [(700, "bfloat16"), (130, "float32")])
def test_ragged_lengths_and_float32(length, dtype):
    arrays = arguments("smolvlm2-500m", length, 2, dtype)
    compile_for("v5e:2x2", lambda *x: attention(*x, implementation="splash_tpu"), *arrays)


def test_the_default_on_a_tpu_is_splash_attention_and_its_memory_does_not_follow_the_square():
    length = 16384
    program = compile_for(
        "v5e:2x2", lambda *x: attention(*x, with_lse=False)[0], *arguments("llava-v1.6-mistral-7b", length)
    )
    assert "tpu_custom_call" in program.as_text()
    copies = length * (2 * 32 + 2 * 8) * 128 * 2  # queries, keys, values and outputs with heads before rows
    assert temporaries(program) < 1.1 * copies


def test_backward_kernel():
    def loss(*arrays):
        return jnp.sum(attention(*arrays, with_lse=False)[0].astype(jnp.float32))

    program = compile_for("v5e:2x2", jax.grad(loss, (0, 1, 2)), *arguments("llava-v1.6-mistral-7b", 1024))
    assert program.as_text().count("tpu_custom_call") >= 3  # forward, and the gradients of queries, and of keys


@pytest.mark.parametrize("window", [None, 1024])
def test_images_that_see_each_other(window):
    """The layers of Gemma 3, of both kinds: the kernel twice, and nothing that follows the square of the length."""
    arrays, blocks = [shape(2, 4096, heads, 256) for heads in (8, 4, 4)], shape(2, 4096, dtype="int32")

    def run(blocks, *arrays):
        return attention(*arrays, Mask(blocks=blocks, window=window), with_lse=False)[0]

    program = compile_for("v5e:2x2", run, blocks, *arrays)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert " while(" not in text
    assert temporaries(program) < 12 * 2 * 4096 * 8 * 256 * 2  # a few copies of the queries; the logits: 1 GB


TOWERS = {  # images at once, tokens, heads, head_dim, whether several images are one sequence
    "llava-onevision-qwen2-7b-ov": (8, 729, 16, 72, False),
    "internvl3-8b": (8, 1025, 16, 64, False),
    "smolvlm2-500m": (8, 1024, 12, 64, False),
    "gemma-3-4b-it": (2, 4096, 16, 72, False),
    "qwen2.5-vl-7b": (1, 5120, 16, 80, True),
    "qwen3-vl-8b": (1, 5120, 16, 72, True),
}


@pytest.mark.parametrize("tower", cases(TOWERS, ["internvl3-8b", "qwen2.5-vl-7b"]))
def test_vision_towers(tower):
    """By default one kernel, no loop, and no logits in memory: XLA would hold up to 1 GiB of them at once."""
    images, length, heads, head_dim, packed = tower
    arrays, frames = [shape(images, length, heads, head_dim)] * 3, shape(images, length, dtype="int32")

    def run(frames, *arrays):
        mask = Mask(causal=False, segments=frames if packed else None, apart=packed)
        return attention(*arrays, mask, with_lse=False)[0]

    program = compile_for("v5e:2x2", run, frames, *arrays)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert " while(" not in text
    assert temporaries(program) < 4 * 2 * images * (length + 128) * heads * 128  # copies of queries, keys, values
