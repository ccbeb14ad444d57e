"""The TPU's compiler takes the column statistics kernels, at the shapes of real models."""

import re

import numpy as np
import pytest
from tpu import compile_for, shape, temporaries

from vlcache_jax.kernels.column_statistics import column_statistics
from vlcache_jax.kernels.shapes import SHAPES

CHIPS = ["v5e:2x2", *(pytest.param(chip, marks=pytest.mark.thorough) for chip in ("v5p:2x2x1", "v6e:2x2"))]

# One model for each head size; the others are thorough.
MODELS = list({shape.head_dim: name for name, shape in SHAPES.items()}.values())
MODELS += [pytest.param(name, marks=pytest.mark.thorough) for name in SHAPES if name not in MODELS]


def compiled(chip, model, length=4096, dtype="bfloat16", batch=2, **options):
    heads, kv_heads, head_dim = SHAPES[model]
    query = shape(batch, length, heads, head_dim, dtype=dtype)
    key = shape(batch, length, kv_heads, head_dim, dtype=dtype)
    index = shape(batch, dtype="int32")
    given = {name: shape(batch, length, heads, dtype="float32") for name in options.pop("given", ())}
    if options.pop("images", False):
        given["last"] = shape(batch, length, dtype="int32")

    def run(query, key, first, count, given):
        return column_statistics(query, key, first, count, **given, **options)

    return compile_for(chip, run, query, key, index, index, given)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
def test_slice_of_rows(model, chip):
    program = compiled(chip, model, max_rows=50, given=("lse",), implementation="pallas_tpu")
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("model", "length"), [("llava-v1.6-mistral-7b", 2880), ("llava-1.5-7b", 1024)])
def test_all_rows(model, length, chip):
    program = compiled(chip, model, length, column_maximum=True, implementation="pallas_tpu")
    heads, kv_heads, head_dim = SHAPES[model]
    copies = 2 * 2 * length * (heads + kv_heads) * head_dim  # query and key with heads before rows, in bfloat16
    assert temporaries(program) < 2 * copies  # for another layout, and some numbers a row; never rows x length


@pytest.mark.parametrize("max_rows", [50, None])
def test_rows_that_see_later_columns(max_rows):
    program = compiled("v5e:2x2", "gemma-3-4b", 2880, max_rows=max_rows, images=True, implementation="pallas_tpu")
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("length", "max_rows", "dtype"), [(1000, 17, "bfloat16"), (40, None, "float32")])
def test_ragged_shapes_and_float32(length, max_rows, dtype):
    compiled("v5e:2x2", "qwen2-7b", length, dtype, max_rows=max_rows, implementation="pallas_tpu")


def test_the_default_on_a_tpu_is_the_kernel_and_memory_does_not_follow_rows_times_length():
    program = compiled("v5e:2x2", "llava-v1.6-mistral-7b", 32768, batch=1, max_rows=64)
    assert "tpu_custom_call" in program.as_text()
    key = 32768 * 8 * 128 * 2
    assert temporaries(program) < 1.5 * key


@pytest.mark.parametrize("rows", [64, 2880])
def test_the_kernels_say_what_they_cost(rows):
    """Counted by hand, row by row: the last rows against the columns up to their own; maxima first, then sums."""
    given = {"given": ("lse",)} if rows == 64 else {}
    program = compiled("v5e:2x2", "llava-v1.6-mistral-7b", 2880, max_rows=rows, implementation="pallas_tpu", **given)
    pairs = 2 * 32 * sum(2880 - rows + 1 + i for i in range(rows))
    text = program.as_text()
    flops, exponentials = (list(map(int, re.findall(rf'"{x}":"(\d+)"', text))) for x in ("flops", "transcendentals"))
    np.testing.assert_allclose(flops, [2 * 128 * pairs] * 2, rtol=0.03)  # rows are padded to whole blocks
    np.testing.assert_allclose(exponentials, [0 if rows == 64 else pairs, pairs], rtol=0.03)
