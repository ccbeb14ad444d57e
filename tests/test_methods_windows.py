"""Windows of recent tokens, and sinks, never take a whole budget without a word."""

import re
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import KV_HEADS, LAYERS, StubModel, kept_sets, stub_params

import vlcache_jax as vlc
from vlcache_jax.cli import main as command_line
from vlcache_jax.demo.study.methods import all_methods
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.policies import METHODS, Uniform
from vlcache_jax.policies.window import AverageShare, forced, settled

OBSERVED = {"snap_kv": vlc.SnapKV, "pyramid_kv": vlc.PyramidKV, "ada_kv": vlc.AdaKV, "mix_kv": vlc.MixKV}
"""The methods whose window is that of the rows that vote."""


def prompts(*lengths):
    """Rows with 16 visual tokens each."""
    index = np.full((len(lengths), max(lengths)), TEXT, np.int32)
    index[:, 1:17] = np.arange(16)
    index = np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], index, TEXT)
    return Batch(np.zeros_like(index), np.array(lengths, np.int32), index, np.zeros((len(lengths), 0, 4, 4, 3)))


@pytest.mark.parametrize("count", [1, 5, 32])
def test_a_window_grows_with_the_slots_and_never_takes_from_the_scores(count):
    sizes = [vlc.Window(count).of(slots) for slots in range(1, 200)]
    np.testing.assert_array_equal(vlc.Window(count).of(jnp.arange(1, 200)), sizes)
    others = np.arange(1, 200) - sizes
    assert np.all(np.diff(sizes) >= 0)
    assert np.all(np.diff(others) >= 0)
    for slots, size in enumerate(sizes, 1):
        assert size == count if slots >= 2 * count else size <= max(slots // 10, slots - count)


def test_what_is_settled_for_the_batch_counts_in_every_layer():
    lengths, slots = jnp.array([27, 64]), jnp.array([[5, 40], [5, 200]])
    for recent, wanted in ((vlc.Window(32), [[2, 2], [5, 32]]), (AverageShare(0.1), [[2, 2], [5, 6]])):
        assert forced(slots, settled(recent, lengths))[0].tolist() == wanted
    assert forced(slots, settled(0.1, lengths))[0].tolist() == [[1, 4], [1, 20]]
    assert forced(slots, settled(vlc.Tokens(7), lengths))[0].tolist() == [[5, 7], [5, 7]]


def test_methods_differ_at_a_tenth_of_270_tokens():
    """With 32 recent tokens all four kept the last 27, whatever they scored."""
    batch = prompts(270)
    params = stub_params(batch)
    found = {}
    for name, method in OBSERVED.items():
        with pytest.warns(vlc.PolicyWarning, match=f"{name}: at a budget of 10 % .* fewer than 64 slots"):
            state = vlc.prefill(StubModel(), params, batch, method(0.1)).start(4)[1]
        found[name] = kept_sets(state)
        assert sum(len(head) for layer in found[name] for head in layer[0]) == KV_HEADS * LAYERS * 27
        for layer in found[name]:
            for head in layer[0]:
                assert head[-2:] == [268, 269]
                if len(head) > 4:
                    assert np.sum(np.array(head) < 270 - 32) >= len(head) // 3, "the scores decide"
    assert all(a == b or found[a] != found[b] for a in found for b in found)


def test_from_twice_the_window_on_it_is_the_authors():
    batch = prompts(150)
    params = stub_params(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = [
            vlc.prefill(StubModel(), params, batch, vlc.SnapKV(0.5, **o)).start(4)[1] for o in ({}, {"window": 32})
        ]
    assert kept_sets(states[0]) == kept_sets(states[1])


def warned(policy, *lengths):
    """The texts of what a check of the prompts warns of; each shown once, as Python's default filter does."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            check_prefill(StubModel().spec, prompts(*lengths), policy, 4)
            check_prefill(StubModel().spec, prompts(*lengths, lengths[0]), policy, 4)
    assert all(x.category is vlc.PolicyWarning for x in seen)
    return [str(x.message) for x in seen]


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (vlc.SnapKV(0.1), "snap_kv: at a budget of 10 % .* fewer than 64 slots, .* vlc.Window. recent=0.1"),
        (vlc.SnapKV(40), "snap_kv: at a budget of 40 tokens a layer .* fewer than 64 slots"),
        (vlc.AdaKV(vlc.Mass(0.9, cap=0.2)), "ada_kv: .* fewer than 64 slots"),
        (vlc.SnapKV(0.1, window=32), r"snap_kv: .* recent=32 tokens and sinks=0 take all slots .* raise the budget"),
        (vlc.PyramidKV(0.1, recent=vlc.Tokens(32)), "recent=32 tokens and sinks=0 take all slots"),
        (vlc.VLCache(0.1, recent=1.0), "recent=1.0 and sinks=0 take all slots"),
        (vlc.PrefixKV(0.02), "prefix_kv: at a budget of 2 % .* recent=0.0 and sinks=4 take all slots"),
        (vlc.ExpectedAttention(0.02), "sinks=4 take all slots"),
        (
            vlc.H2O(0.1, decoding=vlc.Evict(recent=vlc.Tokens(40))),
            "h2o: .* recent=40 tokens and sinks=0 take all slots",
        ),
        (vlc.VLCache(0.1, decoding=vlc.Recompress(8, sinks=90)), "sinks=90 take all slots"),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_window_or_sinks_that_leave_the_scores_nothing_are_told_of_once(policy, text):
    (found,) = warned(policy, 150, 120)
    assert re.search(text, found), found


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full_cache"}))
def test_no_method_warns_where_its_scores_decide(name):
    assert warned(vlc.policy_by_name(name, budget=0.5), 150, 200) == []


def test_nothing_is_warned_of_where_there_is_nothing_to_decide():
    assert warned(vlc.StreamingLLM(0.1), 150) == []  # the window is the method
    assert warned(vlc.SnapKV(32), 20, 32) == []  # kept whole
    assert warned(vlc.VLCache(0.02), 20) == []  # one slot
    assert warned(vlc.FullCache(), 20) == []


@pytest.mark.parametrize("name", OBSERVED)
def test_the_study_measures_the_defaults_that_the_command_line_uses(name):
    (method,) = [method for method in all_methods() if method.name == name]
    assert method.policy(0.1, 12) == vlc.policy_by_name(name, budget=0.1) == OBSERVED[name](0.1)
    assert method.policy(0.1, 12).recent == vlc.Window(32)


def test_the_command_line_shows_one_line(monkeypatch, capsys):
    parser = types.SimpleNamespace(
        parse_args=lambda argv: types.SimpleNamespace(run=lambda _: warnings.warn("small", vlc.PolicyWarning, 1))
    )
    monkeypatch.setattr("vlcache_jax.cli.parser.build_parser", lambda: parser)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command_line.main([]) == 0
    assert capsys.readouterr().err == "vlcache-jax: warning: small\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vlc.Window(0), r"Window\(0\): give a whole number of tokens, at least 1"),
        (lambda: vlc.Window(True), r"Window\(True\)"),
        (lambda: AverageShare(1.5), r"AverageShare\(1.5\) is out of range"),
        (lambda: vlc.SnapKV(recent="32"), r"recent='32' is out of range: .* or Tokens\(n\), or Window\(n\)"),
        (lambda: vlc.Recompress(8, recent="32"), r"Recompress\(recent='32'\) is out of range"),
    ],
)
def test_windows_that_are_none(build, message):
    with pytest.raises(vlc.PolicyError, match=message):
        build()


def test_window_is_a_part_for_any_policy():
    policy = vlc.Policy(name="mine", budget=0.2, recent=vlc.Window(8), allocate=Uniform())
    batch = prompts(60)  # 12 slots: 4 for the window
    kept = kept_sets(vlc.prefill(StubModel(), stub_params(batch), batch, policy).start(4)[1])
    assert all(head[-4:] == [56, 57, 58, 59] and len(head) == 12 for layer in kept for head in layer[0])
