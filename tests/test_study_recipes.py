"""Pruning methods, patterns and recipes as rows of the fidelity study's grid."""

import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.demo.study.methods import Method, choose_methods
from vlcache_jax.demo.study.patterns import PATTERNS
from vlcache_jax.demo.study.prunings import PRUNINGS


def test_recipes_are_rows_of_the_grid():
    """Pruning methods by name, and recipes as they are typed; a budget is the part of the visual tokens that stays."""
    names = [method.name for method in choose_methods(["prunings", "vl_cache:KEEP + fast_v:0.25"])]
    assert names == [*PRUNINGS, "vl_cache:KEEP + fast_v:0.25"]
    assert not any(Method(name).replays for name in names)
    assert Method(names[-1]).recipe(0.1, 16, 300) == vlc.Recipe(vlc.VLCache(0.1), pruning=vlc.FastV(keep=0.25))
    assert Method("snap_kv").recipe(0.1, 16, 300) == vlc.Recipe(vlc.SnapKV(0.1))
    for keep in (0.5, 0.25, 0.1, 0.05):
        for name in PRUNINGS:
            hash(Method(name).recipe(keep, 16, 300))
        pruning = Method("feather").recipe(keep, 16, 300).pruning
        assert pruning.keep[0] * 256 + np.ceil(16 / pruning.stride) ** 2 == pytest.approx(keep * 256, abs=8)


def test_patterns_are_rows_of_the_grid():
    """A budget is the density; beside a typed policy a bare name means the study's pattern or pruning."""
    both = "x_attention + fast_v + vl_cache:0.1"
    assert [method.name for method in choose_methods(["patterns", both])] == [*PATTERNS, both]
    for density in (0.5, 0.25, 0.125):
        for name in PATTERNS:
            assert not Method(name).replays
            hash(Method(name).recipe(density, 16, 1088))
        of_all = Method(both).recipe(density, 16, 1088)
        assert of_all.policy == vlc.VLCache(0.1)
        assert of_all.pruning == Method("fast_v").recipe(density, 16, 1088).pruning
        blocks = 68
        most = np.ceil(of_all.prefill.capacity * blocks)
        listed = sum(min(most, i + 1) for i in range(blocks)) / (blocks * (blocks + 1) / 2)
        assert listed == pytest.approx(density, abs=0.03)
    with pytest.raises(vlc.PolicyError, match="two parts of a kind"):
        choose_methods(["x_attention + flex_prefill"])
    with pytest.raises(vlc.PolicyError, match="two parts of a kind"):
        choose_methods(["x_attention + a_shape:16"])
