"""The whole model against transformers: logits at every position, and greedy answers, from checkpoint and images on."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import make_processor, make_tiny_llava

import vlcache_jax as vlc

NEW = 32
TEXTS = ("user: <image> w1 w2 w3 assistant:", "w4 <image> w5 w6 <image> w7 w8 w9 w10", "w1 w2 w3 w4 w5", "w6 <image>")


def images(seed):
    rng = np.random.default_rng(seed)
    sizes = ((40, 50), (33, 90), (96, 31), (64, 64))
    a, b, c, d = (Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes)
    return [[a], [b, c], [], [d]]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("llava", "llama"),
        ("llava_next", "mistral"),
        *(
            pytest.param(*pair, marks=pytest.mark.thorough)
            for pair in (("llava", "qwen2"), ("llava_next", "llama"), ("llava", "mistral"), ("llava_next", "qwen2"))
        ),
    ],
)
def test_parity(tmp_path, kind, family):
    reference = make_tiny_llava(tmp_path, family, next=kind == "llava_next", seed=3)
    processor = make_processor(reference.config, next=kind == "llava_next")
    vlm = vlc.load(tmp_path, dtype="float32")
    batch = vlm.processor(images=images(0), text=list(TEXTS))
    logits = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))(vlm.params, batch)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    for row, (text, of_row) in enumerate(zip(TEXTS, images(0))):
        inputs = processor(images=of_row or None, text=text, return_tensors="pt")
        n = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(batch.tokens[row, : batch.lengths[row]], inputs["input_ids"][0])
        with torch.no_grad():
            expected = reference(**inputs).logits[0].numpy()
            answer = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[0, n:]
        np.testing.assert_allclose(logits[row, :n], expected, atol=1e-4, rtol=0)
        assert np.abs(expected).max() > 1  # the comparison is not one of nothing with nothing
        np.testing.assert_array_equal(out.tokens[row], answer)


def test_llama3_and_yarn_scaling(tmp_path):
    for name, scaling in {
        "llama3": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        },
        "yarn": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        },
        "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }.items():  # fmt: skip
        folder = tmp_path / name
        reference = make_tiny_llava(folder, text={"rope_parameters": scaling})
        vlm = vlc.load(folder, dtype="float32")
        batch = vlm.processor(text=["w1 w2 w3 w4 " * 30])
        logits = vlm.model.apply({"params": vlm.params}, batch, method="forward")
        n = int(batch.lengths[0])
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor(batch.tokens[:, :n]).long()).logits[0].numpy()
        np.testing.assert_allclose(logits[0, :n], expected, atol=1e-4, rtol=0)
