"""What is kept equals what NVIDIA/kvpress 0.5.5 keeps of the same checkpoint, wherever the definitions agree.

The sets were made once, by `kvpress_sets/make_expected.py`; nothing of kvpress or torch is needed here.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from stub_model import kept_sets
from tiny_models import tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inputs import Batch
from vlcache_jax.models.decoder.config import RopeConfig

FOLDER = Path(__file__).parent / "kvpress_sets"
sys.path.insert(0, str(FOLDER))

import checkpoint  # noqa: E402

EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
WINDOW = checkpoint.WINDOW

# What keeps the same tokens.
EQUAL = {
    "snap_kv": lambda budget: vlc.SnapKV(budget, window=WINDOW),
    "tova": vlc.TOVA,
    "streaming_llm": vlc.StreamingLLM,
    # Without a floor: kvpress' minimum of each head is not the authors' mix.
    "ada_kv": lambda budget: vlc.AdaKV(budget, window=WINDOW, pool=5, pooling="mean", floor_alpha=0.0),
}
# What differs in this alone: here the last token is always kept.
BUT_FOR_THE_LAST = {
    "observed_attention": lambda budget: vlc.H2O(budget, recent=0.0, normalised=True),
    "expected_attention": vlc.ExpectedAttention,
    "key_norm": lambda budget: vlc.KeyNorm(budget, recent=0.0),
    "key_difference": lambda budget: vlc.KeyDifference(budget, recent=0.0),
}


@pytest.fixture(scope="module")
def llava():
    """(model, params) with the checkpoint's decoder."""
    c, w = checkpoint, checkpoint.weights()
    model, params = tiny_llava(
        layers=c.LAYERS, qkv_bias=True, rms_norm_eps=c.EPSILON, rope=RopeConfig(theta=c.THETA), tie_embeddings=False
    )

    def stacked(name):
        tensors = [w[f"model.layers.{layer}.{name}"] for layer in range(c.LAYERS)]
        return np.stack([x.T if x.ndim == 2 else x for x in tensors])

    def dense(name, bias=False):
        return {"kernel": stacked(f"{name}.weight")} | ({"bias": stacked(f"{name}.bias")} if bias else {})

    attention = {full: dense(f"self_attn.{full[0]}_proj", True) for full in ("query", "key", "value")}
    decoder = {
        "embed_tokens": {"embedding": w["model.embed_tokens.weight"]},
        "final_norm": {"scale": w["model.norm.weight"]},
        "lm_head": {"kernel": w["lm_head.weight"].T},
        "layers": {
            "attention": attention | {"output": dense("self_attn.o_proj")},
            "mlp": {name: dense(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
            "input_norm": {"scale": stacked("input_layernorm.weight")},
            "post_attention_norm": {"scale": stacked("post_attention_layernorm.weight")},
        },
    }
    assert jax.tree.map(np.shape, decoder) == jax.tree.map(np.shape, params["decoder"])
    return model, params | {"decoder": decoder}


def kept(llava, policy):
    """[prompt][layer][head], of both prompts in one batch."""
    prompts = checkpoint.prompts()
    length = max(map(len, prompts))
    tokens = np.stack([np.pad(p, (0, length - len(p))) for p in prompts])
    lengths = np.array([len(p) for p in prompts], np.int32)
    batch = Batch(tokens, lengths, np.full_like(tokens, -1), np.zeros((len(prompts), 0, 16, 16, 3), np.float32))
    layers = kept_sets(vlc.prefill(*llava, batch, policy).start(4)[1])
    return [[layer[row] for layer in layers] for row in range(len(prompts))]


@pytest.mark.parametrize("budget", checkpoint.BUDGETS)
@pytest.mark.parametrize("name", EQUAL)
def test_the_same_tokens(llava, name, budget):
    assert kept(llava, EQUAL[name](budget)) == EXPECTED["kept"][name][str(budget)]


@pytest.mark.parametrize("budget", checkpoint.BUDGETS)
@pytest.mark.parametrize("name", BUT_FOR_THE_LAST)
def test_the_same_tokens_but_for_the_last(llava, name, budget):
    found, wanted = kept(llava, BUT_FOR_THE_LAST[name](budget)), EXPECTED["kept"][name][str(budget)]
    for tokens, a, b in zip(checkpoint.prompts(), found, wanted, strict=True):
        last = len(tokens) - 1
        for layer in range(checkpoint.LAYERS):
            for mine, theirs in zip(a[layer], b[layer], strict=True):
                assert len(mine) == len(theirs)
                assert last in mine
                if last in theirs:
                    assert mine == theirs
                else:  # it took the place of their weakest token
                    assert len(set(theirs) - set(mine)) == 1
                    assert set(mine) - set(theirs) == {last}


def test_pyramid_kv_ranks_alike(llava):
    """kvpress lets the window count within the pyramid, the authors' code and this library on top of it."""
    wanted = EXPECTED["kept"]["pyramid_kv"]["0.5"]
    sizes = {len(heads[0]) for prompt in wanted for heads in prompt}
    assert len(sizes) > 2
    for size in sizes:
        found = kept(llava, vlc.SnapKV(size, window=WINDOW))
        for mine, theirs in zip(found, wanted, strict=True):
            for layer, heads in enumerate(theirs):
                if len(heads[0]) == size:
                    assert mine[layer] == heads


@pytest.mark.parametrize("budget", checkpoint.BUDGETS)
def test_ada_kv_s_floor_is_the_authors_not_kvpress(llava, budget):
    """kvpress: at least a fifth of the slots for each head. The authors: a fifth for all alike, the rest by score."""
    theirs = EXPECTED["kept"]["ada_kv_safeguard"][str(budget)]
    mine = kept(llava, vlc.AdaKV(budget, window=WINDOW, pool=5, pooling="mean", floor_alpha=0.2))
    for tokens, a, b in zip(checkpoint.prompts(), mine, theirs, strict=True):
        slots = int(budget * len(tokens))
        for layer in range(checkpoint.LAYERS):
            for heads in (a[layer], b[layer]):
                assert sum(map(len, heads)) == checkpoint.KV_HEADS * slots
            assert min(map(len, a[layer])) >= WINDOW + int(0.2 * (slots - WINDOW))
            assert min(map(len, b[layer])) >= int(0.2 * slots)
    assert mine != theirs or budget == min(checkpoint.BUDGETS)


def test_the_sets_are_of_the_version_that_is_named():
    assert EXPECTED["versions"]["kvpress"] == "0.5.5"
    assert set(EXPECTED["kept"]) == {*EQUAL, *BUT_FOR_THE_LAST, "pyramid_kv", "ada_kv_safeguard"}
