"""The TPU's compiler takes sparse attention at the head shapes of 7B models and at long prompts."""

import jax.numpy as jnp
import pytest
from tiers import later
from tpu import compile_for, shape, temporaries

from vlcache_jax.kernels.shapes import SHAPES
from vlcache_jax.kernels.sparse_attention import Lists, Order, sparse_attention

CHIPS = ["v5e:2x2", *(pytest.param(chip, marks=pytest.mark.thorough) for chip in ("v5p:2x2x1", "v6e:2x2"))]
LLAMA, MISTRAL, QWEN = "llava-1.5-7b", "llava-v1.6-mistral-7b", "qwen2-7b"
SMALL = ["phi-2", "gemma-2b", "smolvlm2-500m"]
CASES = [
    (LLAMA, 32768, False),
    (QWEN, 131072, False),
    *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((LLAMA, 8192, False), (MISTRAL, 32768, False),
      (MISTRAL, 131072, True), (QWEN, 32768, True))),
]  # fmt: skip


def program(chip, model, length, each, part=8, loose=0, order=False):
    heads, kv_heads, head_dim = SHAPES[model]
    blocks, list_heads = length // 128, heads if each else kv_heads
    capacity = blocks // part

    def run(query, key, value, ids, counts, *more):
        arrays = (x.reshape(1, length, -1, head_dim) for x in (query, key, value))  # as a projection gives them
        lists = Lists(ids, counts, order=Order(*more)) if order else Lists(ids, counts, *more)
        return sparse_attention(*arrays, lists)[0].reshape(1, length, -1)

    arrays = [shape(1, length, h * head_dim) for h in (heads, kv_heads, kv_heads)]
    lists = [shape(1, list_heads, blocks, *more, dtype="int32") for more in ((capacity,), ())]
    single = [shape(1, list_heads, loose, dtype="int32")] if loose else []
    single += [shape(1, list_heads, length, dtype="int32")] * 2 * order
    # What full lists ask for: two products for each pair, keys and values of each list, queries and outputs once.
    flops = 4 * heads * blocks * 128 * capacity * 128 * head_dim
    moved = 2 * (list_heads * blocks * capacity * 128 * head_dim * 2 + 2 * length * heads * head_dim)
    return compile_for(chip, run, *arrays, *lists, *single), flops, moved


@pytest.mark.parametrize(("model", "length", "each"), CASES)
@pytest.mark.parametrize("chip", CHIPS)
def test_work_is_that_of_the_listed_blocks(chip, model, length, each):
    """Counted by the compiler, of lists that are full; the kernel's own part as it says itself."""
    compiled, flops, moved = program(chip, model, length, each)
    assert "tpu_custom_call" in compiled.as_text()
    found = compiled.cost_analysis()
    assert found["flops"] <= 1.3 * flops
    assert found["bytes accessed"] <= 1.3 * moved
    assert temporaries(compiled) < 2**26  # nothing is copied: heads lie in their order beside each other


@pytest.mark.parametrize("model", later(*SMALL))
def test_other_head_sizes_and_single_columns(model):
    compiled, _, _ = program("v5e:2x2", model, 4096, False, loose=512)
    assert "tpu_custom_call" in compiled.as_text()


def test_float32():
    arrays = [shape(2, 700, 4, 128, dtype="float32")] * 3
    lists = Lists(shape(2, 4, 6, 3, dtype="int32"), shape(2, 4, 6, dtype="int32"))
    compile_for("v5e:2x2", lambda *x: sparse_attention(*x)[0].astype(jnp.float32), *arrays, lists)


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "length"), [(LLAMA, 32768), (QWEN, 131072)])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tokens_that_were_moved(chip, model, length):
    compiled, flops, moved = program(chip, model, length, False, order=True)
    assert "tpu_custom_call" in compiled.as_text()
    found = compiled.cost_analysis()
    assert found["flops"] <= 1.3 * flops
    assert found["bytes accessed"] <= 1.3 * moved
