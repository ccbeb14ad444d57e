"""Recipes: a policy, a pattern and a pruning method as one value, and as one text."""

import types

import numpy as np
import pytest
from stub_model import StubModel, stub_batch, stub_params
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.patterns.pattern import PATTERNS
from vlcache_jax.policies import METHODS as POLICIES
from vlcache_jax.pruning.method import METHODS as PRUNINGS


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vl_cache", (vlc.VLCache(),)),
        ("vl_cache:0.1,heads=shared", (vlc.VLCache(0.1, heads="shared"),)),
        ("x_attention:0.8", (vlc.FullCache(), vlc.XAttention(0.8))),
        ("fast_v", (vlc.FullCache(), None, vlc.FastV())),
        (
            "feather,keep=0.3/0.09,rooms=8/4 + snap_kv:256,window=16+a_shape:64,window=512",
            (vlc.SnapKV(256, window=16), vlc.AShape(64, 512), vlc.Feather(keep=(0.3, 0.09), rooms=(8, 4))),
        ),
        ("full_cache,bits=8 + keep_curve:1/0.5", (vlc.FullCache(bits=8), None, vlc.KeepCurve((1, 0.5)))),
    ],
)
def test_grammar(text, parts):
    assert vlc.recipe_by_name(text) == vlc.Recipe(*parts)
    assert hash(vlc.recipe_by_name(text)) == hash(vlc.Recipe(*parts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "policy '' does not exist"),
        ("vl_cache + fast_w", "'fast_w' does not exist: did you mean 'fast_v'"),
        ("vl_cache + snap_kv:0.3", "'vl_cache' and 'snap_kv:0.3' are both of the kind policy"),
        ("fast_v:0.25,keep=0.5", "option 'keep' of pruning 'fast_v' is given twice"),
        ("fast_v,layer=2,layer=3", "pruning option 'layer' is given twice"),
        ("fast_v:half", r"keep=half\): give a fraction"),
        ("fast_v,rooms=a/b", "give numbers with / between them"),
        ("fast_v,lair=2", "'lair' of pruning 'fast_v' does not exist: did you mean 'layer'"),
        ("mm_inference + vl_cache + div_prune", "MMInference with pruning=DivPrune: it counts the tokens"),
    ],
)
def test_what_a_text_cannot_say(text, message):
    with pytest.raises(vlc.PolicyError, match=message):
        vlc.recipe_by_name(text)


def test_no_name_means_two_things():
    assert len({*POLICIES, *PATTERNS, *PRUNINGS}) == len(POLICIES) + len(PATTERNS) + len(PRUNINGS)


def test_what_is_no_part_or_does_not_fit_is_refused_before_anything_runs():
    batch = stub_batch()
    vlm = types.SimpleNamespace(model=StubModel(), params=stub_params(batch), processor=None)
    for options, message in (
        ({"policy": vlc.FastV()}, "is not a policy"),
        ({"prefill": vlc.VLCache()}, "is not a pattern"),
        ({"pruning": 0.25}, "is not a pruning method"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            vlc.Recipe(**options)
        with pytest.raises(vlc.PolicyError, match=message):
            vlc.prefill(vlm.model, vlm.params, batch, **options)
    with pytest.raises(vlc.PolicyError, match="give pruning in the recipe"):
        vlc.prefill(vlm.model, vlm.params, batch, vlc.Recipe(), pruning=vlc.FastV())
    for recipe, message in (
        (vlc.Recipe(pruning=vlc.VisionZip()), "needs the attention of the vision tower"),
        (vlc.Recipe(pruning=vlc.FastV(layer=9)), "drops tokens behind layers"),
        (vlc.Recipe(prefill=vlc.AShape(dense_layers=(7,))), r"dense_layers=\[7\] of a model with 3 layers"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            vlc.Engine(vlm, recipe)
        with pytest.raises(vlc.PolicyError, match=message):
            vlc.prefill(vlm.model, vlm.params, batch, recipe)


def test_answers_of_an_engine_are_those_of_generate():
    """A pattern, a pruning with rooms, and a policy; a prompt that keeps more than its room has no answer."""
    pruning = vlc.PyramidDrop((1,), (0.5,), rooms=(36,))
    recipe = vlc.Recipe(vlc.VLCache(budget=0.4), vlc.XAttention(0.9, 4, block=8, min_tokens=0), pruning)
    model, params = tiny_llava(layers=2)
    vlm = types.SimpleNamespace(model=model, params=params, processor=None)
    own = vlc.Engine(vlm, recipe, rows=4, max_new_tokens=9, buckets=[(40, 2)], prefill_rows=4)
    batch = ragged_batch(rows=4, length=36)
    expected = vlc.generate(model, params, batch, recipe, 9, eos_token_ids=[])
    for result in own.run(vlc.Request(prompt=one_row(batch, row), eos_token_ids=[]) for row in range(4)):
        np.testing.assert_array_equal(result.tokens, expected.tokens[result.index])
        np.testing.assert_allclose(result.kept_fraction, expected.report.kept_fraction[result.index])
    text = one_row(ragged_batch(rows=4, length=40), 2)
    (failed,) = own.run([vlc.Request(prompt=text)])
    assert "keeps 40 tokens behind 1 layers" in failed.reason
