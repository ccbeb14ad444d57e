"""The roofline's sums, of a program whose bytes and flops are known: a loop over stacked weights."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tpu import compile_for, shape

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tpu_roofline


def costs(function, *args):
    return tpu_roofline.Costs(compile_for("v5e:2x2", function, *args).as_text(), None)


def test_a_loop_counts_as_often_as_it_runs_and_reads_a_slice_each_time():
    layers, width = 6, 2048
    weights = shape(layers, width, width)

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = costs(run, weights, shape(16, width))
    assert found.flops == 2 * 16 * width**2 * layers
    assert found.bytes == pytest.approx(layers * width**2 * 2, rel=0.05)


def test_batched_products():
    images, tokens, heads, size = 8, 577, 16, 64

    def run(q, k):
        return jnp.einsum("bthd,bshd->bhts", q, k)

    found = costs(run, *[shape(images, tokens, heads, size)] * 2)
    assert found.flops == 2 * images * heads * tokens**2 * size
