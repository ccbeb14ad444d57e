"""Sparse prefill end to end: a pattern of everything is dense, rows are alone, the report counts what was listed."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from text_model import TextModel, text_batch
from tiers import cases
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.parallel import ops
from vlcache_jax.patterns import attending

LENGTH, LENGTHS, BLOCK, NEW = 64, [60, 41, 22, 7], 8, 5
IMAGES = ((2, 16), (25, 16))
CONFIG = DecoderConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, max_positions=256, rope=RopeConfig(theta=1e4), rms_norm_eps=1e-5,
)  # fmt: skip
SMALL = {"min_tokens": 0, "block": BLOCK}
SHAPE = vlc.AShape(8, 16, **SMALL)


@pytest.fixture(scope="module")
def tiny():
    model = TextModel(CONFIG, jnp.dtype("float32"))
    params = model.init(jax.random.key(0), text_batch([3], 16))["params"]
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def batch():
    return text_batch(LENGTHS, LENGTH, images=IMAGES)


def everything(inputs):
    return jnp.ones((1, 1, inputs.blocks, inputs.blocks), bool)


@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(0.3), vlc.SnapKV(0.3, window=4)], ids=lambda p: p.name)
def test_everything_is_dense(tiny, batch, policy):
    dense = vlc.generate(*tiny, batch, policy, NEW)
    sparse = vlc.generate(*tiny, batch, policy, NEW, prefill=vlc.BlockMask(everything, **SMALL))
    np.testing.assert_array_equal(sparse.tokens, dense.tokens)
    np.testing.assert_array_equal(sparse.report.kept, dense.report.kept)
    np.testing.assert_allclose(sparse.report.density, dense.report.density, rtol=1e-5)
    assert dense.report.prefill is None
    np.testing.assert_allclose(sparse.report.prefill.density, 1)
    np.testing.assert_array_equal(sparse.report.prefill.overflow, 0)
    assert sparse.report.prefill.dense_layers == ()
    assert sparse.report.prefill.why is None


@pytest.mark.parametrize("policy", [vlc.SnapKV(0.3, window=BLOCK), vlc.VLCache(0.3, rows=vlc.LastRows(BLOCK))])
def test_the_rows_that_pattern_and_policy_look_at_are_computed_once(tiny, batch, policy):
    pattern = vlc.FlexPrefill(0.6, 0.3, 8, **SMALL)
    with mock.patch.object(attending, "LastRows", return_value=None):  # never the policy's
        apart = vlc.compress(*tiny, batch, policy, prefill=dataclasses.replace(pattern, min_tokens=1))
    with mock.patch.object(ops, "column_statistics", None):
        shared = vlc.compress(*tiny, batch, policy, prefill=pattern)
    np.testing.assert_array_equal(shared.report.kept, apart.report.kept)
    np.testing.assert_allclose(shared.report.density, apart.report.density, rtol=1e-5)
    for x, y in zip(shared.stores, apart.stores):
        np.testing.assert_array_equal(x.positions, y.positions)


TABLE = ((("vertical_and_slash", 4, 8), ("stream_llm", 8, 8), ("block_sparse", 1, 1)),) * 3
ALL = {
    "x_attention": vlc.XAttention(0.7, 4, **SMALL),
    "flex_prefill": vlc.FlexPrefill(0.6, 0.3, 8, **SMALL),
    "m_inference": vlc.MInference(TABLE, **SMALL),
    "tri_shape": vlc.TriShape(8, 16, 8, heads="each", **SMALL),
}


@pytest.mark.parametrize("pattern", cases(ALL, ["x_attention"]))
def test_a_row_of_a_batch_is_the_row_alone(tiny, batch, pattern):
    together = vlc.generate(*tiny, batch, vlc.VLCache(0.3), NEW, prefill=pattern)
    for row in range(len(LENGTHS)):
        alone = vlc.generate(*tiny, one_row(batch, row), vlc.VLCache(0.3), NEW, prefill=pattern)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.report.kept[0], together.report.kept[row])
        np.testing.assert_allclose(alone.report.prefill.density[0], together.report.prefill.density[row], rtol=1e-6)


@pytest.mark.parametrize("pattern", cases(ALL, ["m_inference"]))
def test_on_a_mesh(tiny, batch, pattern):
    model, params = tiny
    plain = vlc.generate(model, params, batch, vlc.VLCache(0.3), NEW, prefill=pattern)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    out = vlc.generate(model, placed, batch, vlc.VLCache(0.3), NEW, prefill=pattern)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
    np.testing.assert_allclose(out.report.prefill.density, plain.report.prefill.density, rtol=1e-6)


@pytest.mark.thorough
def test_moved_tokens_in_a_model():
    """MMInference: near everything is dense; rows are alone; the same on a mesh."""
    model, params = tiny_llava(layers=2, heads=8, kv_heads=4)
    images = ragged_batch(rows=4, length=96, seed=3, tiles=4)
    run = lambda batch, prefill, params=params: vlc.generate(  # noqa: E731
        model, params, batch, vlc.VLCache(0.5), NEW, eos_token_ids=[], prefill=prefill
    )
    dense, near = run(images, None), run(images, vlc.MMInference(96, block=4, min_tokens=0))
    np.testing.assert_array_equal(near.tokens, dense.tokens)
    pattern = vlc.MMInference(4, block=4, min_tokens=0)
    out = run(images, pattern)
    logits = [vlc.compress(model, params, images, prefill=prefill).logits for prefill in (None, pattern)]
    assert not np.allclose(*(x[1] for x in logits), atol=1e-3)
    for row in range(4):
        alone = run(one_row(images, row), pattern)
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])
        np.testing.assert_allclose(alone.report.prefill.density[0], out.report.prefill.density[row], rtol=1e-6)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    for heads in ("group", "each"):
        one, split = (run(images, dataclasses.replace(pattern, heads=heads), x) for x in (params, placed))
        np.testing.assert_array_equal(split.tokens, one.tokens)
        np.testing.assert_allclose(split.report.prefill.density, one.report.prefill.density, rtol=1e-6)


def test_it_differs_from_dense_and_the_report_counts(tiny, batch):
    dense, ctx = (vlc.compress(*tiny, batch, prefill=prefill) for prefill in (None, SHAPE))
    assert not np.allclose(dense.logits[0], ctx.logits[0], atol=1e-3)
    np.testing.assert_allclose(ctx.logits[3], dense.logits[3], atol=1e-5)  # shorter than the window
    for row, length in enumerate(LENGTHS):
        blocks = -(-length // BLOCK)
        listed = sum(c == 0 or r - c <= 2 for r in range(blocks) for c in range(r + 1))
        expected = listed / (blocks * (blocks + 1) / 2)
        np.testing.assert_allclose(ctx.report.prefill.density[row], expected, rtol=1e-6)


def test_short_prompts_and_named_layers_are_dense(tiny, batch):
    dense = vlc.compress(*tiny, batch)
    short = vlc.compress(*tiny, batch, prefill=dataclasses.replace(SHAPE, min_tokens=LENGTH + 1))
    np.testing.assert_array_equal(short.logits, dense.logits)
    assert short.report.prefill.dense_layers == (0, 1, 2)
    assert "64 tokens are fewer than AShape(min_tokens=65)" in short.report.prefill.why
    some = vlc.compress(*tiny, batch, prefill=dataclasses.replace(SHAPE, dense_layers=(0, 2)))
    assert some.report.prefill.dense_layers == (0, 2)
    density = np.asarray(some.report.prefill.density)
    assert (density[:, [0, 2]] == 1).all()
    assert density[0, 1] < 1


def test_a_full_list_keeps_the_best_and_says_so(tiny, batch):
    ctx = vlc.compress(*tiny, batch, prefill=dataclasses.replace(SHAPE, capacity=0.25))
    wanted = [min(r + 1, 4) if r > 2 else r + 1 for r in range(8)]  # of the longest row: the first block and 3 near
    np.testing.assert_array_equal(ctx.report.prefill.overflow[0], 2 * sum(max(0, n - 2) for n in wanted))
    assert (np.asarray(ctx.report.prefill.density) > 0).all()


def test_pruning_beside_it(tiny, batch):
    prune = vlc.PyramidDrop((1, 2), (0.5, 0.25), rooms=(48, 40))
    out = vlc.generate(*tiny, batch, vlc.VLCache(0.5), NEW, prefill=SHAPE, pruning=prune)
    plain = vlc.generate(*tiny, batch, vlc.VLCache(0.5), NEW, pruning=prune)
    everything_too = vlc.BlockMask(everything, **SMALL)
    whole = vlc.generate(*tiny, batch, vlc.VLCache(0.5), NEW, prefill=everything_too, pruning=prune)
    np.testing.assert_array_equal(whole.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.stage_tokens, plain.report.stage_tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vlc.AShape(sinks=-1), r"AShape\(sinks=-1\)"),
        (lambda: vlc.AShape(window=0), r"AShape\(window=0\)"),
        (lambda: vlc.AShape(heads="all"), "'group' or 'each'"),
        (lambda: vlc.AShape(capacity=0), "share of the blocks"),
        (lambda: vlc.TriShape(last=-1), r"TriShape\(last=-1\)"),
        (lambda: vlc.BlockMask(3), "give a function"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(vlc.PolicyError, match=message):
        make()


def test_what_does_not_fit_the_model_is_refused(tiny, batch):
    with pytest.raises(vlc.PolicyError, match="is not a pattern"):
        vlc.generate(*tiny, batch, prefill="a_shape")
    with pytest.raises(vlc.PolicyError, match="a table of 2 layers for a model of 3"):
        vlc.generate(*tiny, batch, prefill=vlc.MInference(TABLE[:2]))
    with pytest.raises(vlc.PolicyError, match="does not tell where its visual tokens lie"):
        vlc.generate(*tiny, batch, prefill=vlc.MMInference(**SMALL))
    with pytest.raises(vlc.PolicyError, match=r"dense_layers=\[3\]"):
        vlc.generate(*tiny, batch, prefill=vlc.AShape(dense_layers=(3,)))
