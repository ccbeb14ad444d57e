"""The engine with every kind of store: rows of the largest bucket hold smaller prompts, too."""

import types

import numpy as np
import pytest
from test_engine import vlm
from tiers import later
from tiny_models import one_row, ragged_batch, tiny_llava

import vlcache_jax as vlc

KINDS = {
    "ada_kv": vlc.AdaKV(budget=0.4, window=4),
    "quantised": vlc.ZipVL(budget=0.4),
    "evicted": vlc.VLCache(budget=0.3, evicted=vlc.Quantise(bits=4)),
    "window": vlc.SnapKV(budget=0.4, window=4, decoding=vlc.RollingWindow(4)),
    "full_cache": vlc.FullCache(),
}


@pytest.mark.parametrize("name", ["evicted", *later(*[name for name in KINDS if name != "evicted"])])
def test_every_kind_of_store_in_rows_of_the_largest_bucket(name):
    check_with_generate(vlm(), KINDS[name])


@pytest.mark.thorough
def test_layers_with_windows():
    model, params = tiny_llava(layers=3, windows=(8, None, 8))
    check_with_generate(types.SimpleNamespace(model=model, params=params, processor=None), vlc.VLCache(budget=0.4))


def check_with_generate(own, policy):
    """Short prompts and long ones, through two buckets, answer what they do in a batch of their own."""
    batch = ragged_batch(rows=8, length=40)
    expected = vlc.generate(own.model, own.params, batch, policy, 9, eos_token_ids=[])
    running = vlc.Engine(own, policy, rows=4, max_new_tokens=9, buckets=[(24, 2), (40, 2)], prefill_rows=2)
    requests = [vlc.Request(prompt=one_row(batch, row), eos_token_ids=[]) for row in range(8)]
    for result in running.run(requests):
        np.testing.assert_array_equal(result.tokens, expected.tokens[result.index])
