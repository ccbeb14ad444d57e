"""The SigLIP tower against transformers' SiglipVisionModel on tiny random weights, read by its weight rules."""

import flax.traverse_util
import numpy as np
import pytest
import torch
import transformers
from text_decoders import sharpen

from vlcache_jax.errors import InputError
from vlcache_jax.models.io.rules import WeightRules
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.models.vision.siglip import SiglipVisionTower
from vlcache_jax.models.vision.weights import siglip_rules

SIZES = {"hidden_size": 24, "intermediate_size": 40, "image_size": 20, "patch_size": 4}
CONFIG = VisionConfig(**SIZES, num_layers=3, num_heads=2, layer_norm_eps=1e-6, activation="gelu_pytorch_tanh")
RULES = WeightRules(rules=siglip_rules("tower"), rename=lambda name: name)
PIXELS = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    sizes = SIZES | {"num_hidden_layers": 3, "num_attention_heads": 2, "vision_use_head": False}
    torch.manual_seed(0)
    return sharpen(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)), 0.2)


@pytest.fixture(scope="module")
def params(reference):
    flat = {}
    for full, value in reference.state_dict().items():
        name, layer = RULES.canonical(f"tower.{full.removeprefix('vision_model.')}")
        rule = RULES.by_name[name]
        value = value.numpy() if rule.axes is None else value.numpy().transpose(rule.axes)
        flat.setdefault(rule.path[1:], {})[layer] = value
    stacked = {path: of[None] if None in of else np.stack([of[i] for i in range(3)]) for path, of in flat.items()}
    return {"params": flax.traverse_util.unflatten_dict(stacked)}


def test_the_last_hidden_state_equals_transformers(reference, params):
    with torch.no_grad():
        expected = reference(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_allclose(SiglipVisionTower(CONFIG).apply(params, PIXELS), expected.numpy(), atol=1e-5)
    plain = np.array(SiglipVisionTower(CONFIG).apply(params, PIXELS, (3,)))
    scale, bias = (torch.from_numpy(params["params"]["post_norm"][name]) for name in ("scale", "bias"))
    normed = torch.nn.functional.layer_norm(torch.from_numpy(plain), (24,), scale, bias, 1e-6)
    np.testing.assert_allclose(normed.numpy(), expected.numpy(), atol=1e-5)
    assert np.abs(plain - expected.numpy()).max() > 0.1


def test_a_part_of_an_image_takes_its_rows_of_the_table(params):
    """Without layers a hidden state is local to its patch."""
    embedding = SiglipVisionTower(VisionConfig(**SIZES, num_layers=0, num_heads=2))
    rows = np.array([6, 7, 11, 12], np.int32)
    part = embedding.apply(params, PIXELS[:, 4:12, 4:12], (0,), rows)
    np.testing.assert_allclose(part, embedding.apply(params, PIXELS, (0,))[:, rows], atol=1e-6)


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(InputError, match="images are 8x8, the vision tower takes 20x20"):
        SiglipVisionTower(CONFIG).apply(params, PIXELS[:, :8, :8])
