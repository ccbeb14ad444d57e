"""How many tokens a layer of the prefill hands on: by default as many as it can get, or what was said."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import LAYERS, StubModel, kept_sets, stub_batch, stub_params
from test_methods_promises import row_alone

import vlcache_jax as vlc
from vlcache_jax.policies.allocate.uniform import Allocate, Uniform
from vlcache_jax.policies.methods.pyramid_kv import Pyramid
from vlcache_jax.policies.shares import SlotBudget


@dataclasses.dataclass(frozen=True)
class Long(StubModel):
    @property
    def spec(self):
        return dataclasses.replace(super().spec, max_positions=1024)


@pytest.mark.parametrize("rule", [Uniform(), Pyramid(1), Pyramid(3), Pyramid(20), Pyramid(20, 0.3)], ids=repr)
def test_rules_that_do_not_look_at_the_prompt_keep_to_what_they_say(rule):
    """For every length: at most what it says of that length, and what it says never falls as prompts grow."""
    lengths = jnp.arange(1, 900, 7)
    for layers in (1, 2, 5, 32):
        for size in ({"fraction": 0.05}, {"fraction": 0.4}, {"fraction": 0.9}, {"per_layer": 100}, {"slots": 999}):
            budget = SlotBudget(layers, **size)
            slots = np.asarray(rule.slots(jnp.ones((len(lengths), layers)), lengths, budget))
            most = np.minimum(lengths, [rule.most(int(n), budget) for n in lengths])
            np.testing.assert_array_equal(np.minimum(rule.most(lengths, budget), lengths), most)
            assert (slots.max(axis=1) <= most).all()
            assert (np.diff(most) >= 0).all()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (vlc.VLCache(0.1), 4 * 1000),
        (vlc.VLCache(0.3), 10_000),
        (vlc.VLCache(200), 4 * 200),
        (vlc.VLCache(0.01), 512),  # no matter of memory
        (vlc.PrefixKV(0.05), 8 * 500),
        (vlc.AirCache(0.05), 10_000),
        (vlc.SnapKV(0.1), 1000),
        (vlc.PyramidKV(0.1), 2 * 1000 + 1),
        (vlc.SnapKV(vlc.Mass(0.9, cap=0.1)), 8 * 1000),
        (vlc.VLCache(0.1, candidate_fraction=0.25), 2500),
        (vlc.VLCache(200, candidate_fraction=0.01), 200),  # what the average layer gets
        (vlc.VLCache(0.1, candidate_fraction=1), 10_000),
        (vlc.Policy(name="own", budget=0.1, allocate=Allocate()), 10_000),  # of which nothing is known
        (vlc.AdaKV(0.1), 10_000),
        (vlc.LookM(0.1), 10_000),  # merges the others
        (dataclasses.replace(vlc.SnapKV(0.1, bits=4), evicted=vlc.Quantise(2)), 10_000),
    ],
)
def test_how_many(policy, expected):
    size = {"per_layer": 200} if isinstance(policy.budget, vlc.Tokens) else {"fraction": 0.1}
    if isinstance(policy.budget, float):
        size = {"fraction": policy.budget}
    budget = SlotBudget(layers=8, **size)
    assert policy.candidates(10_000, budget) == expected
    assert policy.candidates(jnp.array([10_000]), budget).tolist() == [expected]
    assert policy.candidates(300, budget) == {0.25: 75, 0.01: 200}.get(policy.candidate_fraction, 300)


def test_what_is_kept_of_a_long_prompt_is_what_all_candidates_give():
    """Beside others and alone, at another padding; where a prompt's layers get too much for the pool, it says so."""
    batch = stub_batch(700)
    batch = dataclasses.replace(batch, lengths=np.array([700, 640, 530, 300, 3], np.int32))
    params = stub_params(batch)

    def prefill(policy, *prompts):
        ctx = vlc.prefill(Long(), prompts[1], prompts[0], policy)
        return ctx.report, kept_sets(ctx.start(4)[1])

    policy = vlc.VLCache(0.15)
    assert policy.candidates(700, SlotBudget(LAYERS, fraction=0.15)) == 512
    report, kept = prefill(policy, batch, params)
    assert np.asarray(report.exact).all()
    whole, wanted = prefill(dataclasses.replace(policy, candidate_fraction=1), batch, params)
    assert kept == wanted
    np.testing.assert_array_equal(report.kept, whole.kept)

    policy = dataclasses.replace(policy, candidate_fraction=0.16)
    report, kept = prefill(policy, batch, params)
    assert not np.asarray(report.exact)[:4].any()
    own = np.maximum(1, 16 * batch.lengths // 100)  # of the prompt itself, without its padding
    np.testing.assert_array_equal(report.kept, np.minimum(whole.kept, own[:, None]))
    _, alone = prefill(policy, *row_alone(batch, params, 2, 700))
    assert [layer[0] for layer in alone] == [layer[2] for layer in kept]
