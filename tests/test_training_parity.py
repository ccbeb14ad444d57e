"""The loss and the gradient of a Qwen-VL with an image, all of its parameters, against transformers and torch."""

import shutil

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from tiny_qwen import make_tiny_qwen, pictures, reference_inputs

import vlcache_jax as vlc
from vlcache_jax.training.examples import make_train_batch
from vlcache_jax.training.loss import answer_loss

PROMPT, ANSWER = "w1 <|vision_start|><|image_pad|><|vision_end|> w2 w3", "w5 w6 w5"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_gradient_of_every_parameter(tmp_path, kind):
    """Torch's gradients are read as a checkpoint is, since all that reading does to weights is linear."""
    reference = make_tiny_qwen(tmp_path / "model", kind)
    vlm = vlc.load(tmp_path / "model", dtype="float32", layout="stacked")
    image = pictures()[0]
    batch = make_train_batch(vlm.processor, [[image]], [PROMPT], [ANSWER], length=96)
    (loss, metrics), found = jax.jit(jax.value_and_grad(answer_loss(vlm.model), has_aux=True))(vlm.params, batch)

    inputs = reference_inputs(f"{PROMPT} {ANSWER} <|im_end|>", [image])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -4:] = inputs["input_ids"][0, -4:]
    expected = reference(**inputs, labels=labels).loss
    expected.backward()
    assert metrics["weight"] == 4
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)

    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    shutil.copytree(tmp_path / "model", tmp_path / "gradients")
    reference.save_pretrained(tmp_path / "gradients")
    wanted = flatten_dict(vlc.load(tmp_path / "gradients", dtype="float32", layout="stacked").params, sep="/")
    found = flatten_dict(found, sep="/")
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert np.abs(gradient).max() > 1e-7, name
        np.testing.assert_allclose(found[name], gradient, atol=2e-5 + 1e-4 * np.abs(gradient).max(), err_msg=name)
