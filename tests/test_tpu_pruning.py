"""The TPU's compiler on layers that run in ranges: none of the stacked weights is copied for a range."""

import math
import re

import jax
import pytest
from text_model import TextModel, text_batch
from tpu import compile_for, temporaries

import vlcache_jax as vlc
from vlcache_jax.models.decoder.config import DecoderConfig

ROWS, PROMPT = 2, 1024
CONFIG = DecoderConfig(
    family="llama", vocab_size=1024, hidden_size=2048, intermediate_size=8192, num_layers=12, num_heads=16,
    num_kv_heads=4, head_dim=128, max_positions=4096,
)  # fmt: skip
MODEL = TextModel(CONFIG, dtype="bfloat16")
PRUNE = vlc.PyramidDrop((4, 8), (0.5, 0.25), rooms=(640, 384))


def shapes():
    batch = text_batch([PROMPT] * ROWS, PROMPT, images=((2, 768),))
    params = jax.eval_shape(lambda b: MODEL.init(jax.random.key(0), b), batch)["params"]
    abstract = lambda tree, dtype=None: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree
    )
    return abstract(params, "bfloat16"), abstract(batch)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(budget=0.1)], ids=["full", "10 %"])
def test_ranges_copy_no_weights(policy):
    params, batch = shapes()
    weights = sum(2 * math.prod(x.shape) for x in jax.tree.leaves(params["decoder"]["layers"]))

    def compiled(pruning):
        return compile_for(
            "v5e:2x2", lambda p, b: vlc.prefill(MODEL, p, b, policy, pruning=pruning).stores, params, batch
        )

    pruned = compiled(PRUNE)
    text = pruned.as_text()
    assert "splash" in text
    assert not re.search(r"= bf16\[12,2048,\d+\][^ ]* (copy|transpose)\(", text)
    if policy.keeps_all:
        assert temporaries(pruned) < 0.05 * weights  # one of the ranges would be a third
    else:
        assert temporaries(pruned) < temporaries(compiled(None)) + 0.05 * weights
