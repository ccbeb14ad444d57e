"""Models of every kind in bfloat16 against transformers: no further from float32 than transformers' own bfloat16 is.

A tolerance of its own would be a guess: how far rounding moves logits depends on the weights. Both programs round
the same numbers, though in another order, so that their errors are of one size and not correlated: over hundreds of
positions and all of the vocabulary, the sizes differ by a few per cent. A norm, a rotation or a softmax in bfloat16
instead of float32, or a scale that is rounded where it should not be, shows as more.
"""

import copy

import jax
import numpy as np
import pytest
import tiny_checkpoints
import torch
from test_gemma3 import TEXTS as GEMMA_TEXTS
from test_gemma3 import pictures as gemma_pictures
from test_parity_llava import TEXTS as LLAVA_TEXTS
from test_parity_llava import images as llava_images
from test_parity_qwen_vl import TEXTS as QWEN_TEXTS
from test_parity_qwen_vl import images as qwen_images
from tiny_families import TINY, pictures
from tiny_gemma3 import make_processor, make_tiny_gemma3
from tiny_qwen import make_tiny_qwen, reference_inputs

import vlcache_jax as vlc


def _processor(processor):
    return lambda text, images: processor(images=[images] if images else None, text=[text], return_tensors="pt")


def _llava(folder):
    reference = tiny_checkpoints.make_tiny_llava(folder, "mistral", next=True)
    return reference, _processor(tiny_checkpoints.make_processor(reference.config, next=True))


KINDS = {
    "llava_next": (_llava, LLAVA_TEXTS, lambda: llava_images(0)),
    "internvl": (
        lambda folder: (TINY["internvl"].make(folder), _processor(TINY["internvl"].processor())),
        TINY["internvl"].texts,
        pictures,
    ),
    "gemma3": (
        lambda folder: (make_tiny_gemma3(folder), _processor(make_processor())),
        GEMMA_TEXTS,
        gemma_pictures,
    ),
    "qwen2_5_vl": (lambda folder: (make_tiny_qwen(folder, "qwen2_5_vl"), reference_inputs), QWEN_TEXTS, qwen_images),
    "qwen3_vl": (lambda folder: (make_tiny_qwen(folder, "qwen3_vl"), reference_inputs), QWEN_TEXTS, qwen_images),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_transformers(kind, tmp_path):
    make, texts, images = KINDS[kind]
    exact, inputs_of = make(tmp_path)
    rounded = copy.deepcopy(exact).bfloat16()
    vlm = vlc.load(tmp_path, dtype="bfloat16")
    batch = vlm.processor(images=images(), text=list(texts))
    logits = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))(vlm.params, batch)
    ours, theirs = [], []
    for row, (text, of_row) in enumerate(zip(texts, images())):
        inputs = inputs_of(text, of_row)
        half = {k: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
        n = inputs["input_ids"].shape[1]
        with torch.no_grad():
            wanted = exact(**inputs).logits[0].numpy()
            theirs.append(rounded(**half).logits[0].float().numpy() - wanted)
        ours.append(np.asarray(logits[row, :n], np.float32) - wanted)
    ours, theirs = (np.sqrt(np.mean(np.square(np.concatenate(errors)))) for errors in (ours, theirs))
    print(kind, ours, theirs)
    assert 0 < ours <= 1.15 * theirs
