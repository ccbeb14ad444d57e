"""What is fast on two cores and a disaster on a chip: lowered for TPUs and GPUs, no loop over heads, rows or images."""

import re
from functools import cache, partial

import jax
import pytest
from hlo import collectives, loops
from tpu import chip_llava, compile_for, mesh_of, shape

import vlcache_jax as vlc
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.attention import CAUSAL, FULL, Mask, attention
from vlcache_jax.planning.compiling import compile_on
from vlcache_jax.planning.placement import place, place_params

ROWS, LENGTH, TILES = 4, 256, 2


@cache
def model():
    return chip_llava(kv_heads=2)


def batch():
    side = model().config.vision.image_size
    whole = shape(ROWS, LENGTH, dtype="int32")
    return Batch(whole, shape(ROWS, dtype="int32"), whole, shape(ROWS, TILES, side, side, 3, dtype="float32"))


def forward(params, batch):
    return model().apply({"params": params}, batch, method="forward")


def full_prefill(params, batch):
    return vlc.prefill(model(), params, batch, vlc.FullCache()).start(8)


@pytest.mark.parametrize("run", [forward, full_prefill])
def test_lowered_for_gpus_only_layers_are_a_loop(run):
    """The tower's, the decoder's, and no more: neither attention loops over rows, heads or images."""
    lowered = jax.jit(run).trace(model().abstract_params(), batch()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.while") == 2


def test_compiled_for_tpus_only_layers_are_a_loop():
    """Images are split over "data", heads over "model": towers and attention talk to no other chip."""
    mesh = mesh_of("v5e:2x2", {"data": 2, "model": 2})
    compiled = compile_on(mesh, forward, place_params(model().abstract_params(), mesh), place(batch(), mesh))
    text = compiled.as_text()
    assert [(loop.place.split("/")[-2:], loop.depth) for loop in loops(text)] == [
        (["vision", "while"], 0), (["decoder", "while"], 0)
    ]  # fmt: skip
    inside = [(x.kind, x.place.split("/layers/")[-1]) for x in collectives(text) if x.depth]
    narrowing = ("attention/output", "mlp/fc2", "attention/output", "mlp/down")
    assert sorted(inside) == sorted(("all-reduce", f"{name}/dot_general") for name in narrowing)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("mask", ["causal", "full", "segments"])
def test_attention_in_chunks_takes_all_heads_and_rows_at_once(mask, platform):
    """Of long prompts with many heads, for which no kernel serves: the products of each chunk span the batch."""
    rows, length, heads, kv_heads = 4, 8192, 16, 4
    masks = {"causal": CAUSAL, "full": FULL, "segments": Mask(segments=shape(rows, length, dtype="int32"))}
    query, key = shape(rows, length, heads, 512), shape(rows, length, kv_heads, 512)  # too wide for splash attention
    run = jax.jit(partial(attention, with_lse=False))
    text = run.trace(query, key, key, masks[mask]).lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" not in text
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    for line in products:  # rows of the batch and KV heads
        assert re.search(r"batching_dims = \[\d, \d\] x \[\d, \d\]", line), line
    assert text.count("stablehlo.while") <= 8


def test_an_attention_of_all_images_is_two_products_on_a_tpu():
    heads = shape(64, 577, 16, 64)
    text = compile_for("v5e:2x2", lambda *x: attention(*x, FULL, with_lse=False)[0], *[heads] * 3).as_text()
    assert len(loops(text)) <= 1  # chunks of query rows, where many logits exist at once
    assert text.count(" convolution(") == 2
