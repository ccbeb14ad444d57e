"""Rotary frequencies and rotation against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vlcache_jax.models.decoder import rope
from vlcache_jax.models.decoder.config import RopeConfig

HEAD_DIM = 64
POSITIONS = 4096
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
CASES = {
    "default": {"rope_theta": 500_000.0},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_theta": 500_000.0,
    },
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "rope_theta": 1_000_000.0},
    "yarn, attention factor": {**YARN, "attention_factor": 1.3},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, half of mscale": {**YARN, "mscale": 0.7},
}
NAMES = {"original_max_position_embeddings": "original_max_positions", "rope_theta": "theta"}


def theirs(case):
    kind = case.split(",")[0]
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **CASES[case]}
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rope_parameters=parameters,
    )


def ours(case):
    return RopeConfig(kind=case.split(",")[0], **{NAMES.get(k, k): v for k, v in CASES[case].items()})


@pytest.mark.parametrize("case", CASES)
def test_frequencies(case):
    frequency, factor = rope.frequencies(ours(case), HEAD_DIM, POSITIONS)
    config = theirs(case)
    if case == "default":
        wanted, wanted_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[case.split(",")[0]](config, torch.device("cpu"))
    assert frequency.dtype == np.float32
    np.testing.assert_allclose(frequency, wanted.numpy(), rtol=2e-6)
    assert factor == pytest.approx(wanted_factor, rel=1e-6)


def test_the_cases_differ():
    plain = RopeConfig()
    for case in CASES:
        frequency, factor = rope.frequencies(ours(case), HEAD_DIM, POSITIONS)
        unscaled, _ = rope.frequencies(plain, HEAD_DIM, POSITIONS)
        assert case == "dynamic" or factor != 1 or np.abs(frequency / unscaled - 1).max() > 0.1


@pytest.mark.parametrize("case", ["default", "llama3", "yarn"])
def test_rotation(case):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3, HEAD_DIM)).astype(np.float32)
    positions = rng.integers(0, POSITIONS, (2, 7))
    cos, sin = rope.rotation(jnp.asarray(positions), ours(case), HEAD_DIM, POSITIONS)
    assert cos.shape == sin.shape == (2, 7, HEAD_DIM // 2)
    actual = rope.rotate(jnp.asarray(x), cos, sin)
    embedding = LlamaRotaryEmbedding(theirs(case))
    their_cos, their_sin = embedding(torch.zeros(1), torch.from_numpy(positions))
    turned = torch.from_numpy(x).transpose(1, 2)
    wanted = apply_rotary_pos_emb(turned, turned, their_cos, their_sin)[0].transpose(1, 2).numpy()
    # The angle of the fastest pair is its position: float32 leaves 4096 * 2 ** -24 of it.
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-3)
    near = positions < 200
    np.testing.assert_allclose(np.asarray(actual)[near], wanted[near], rtol=0, atol=1e-4)


def test_dynamic_scaling_goes_by_the_length_of_the_row():
    lengths = (100, POSITIONS, POSITIONS + 1, 3 * POSITIONS)
    positions = np.stack([np.minimum(np.linspace(0, n - 1, 9).round().astype(int), n - 1) for n in lengths])
    cos, sin = rope.rotation(jnp.asarray(positions), ours("dynamic"), HEAD_DIM, POSITIONS)
    for row in range(len(lengths)):
        embedding = LlamaRotaryEmbedding(theirs("dynamic"))
        wanted = [
            x[0, :, : HEAD_DIM // 2].numpy() for x in embedding(torch.zeros(1), torch.from_numpy(positions[[row]]))
        ]
        np.testing.assert_allclose(cos[row], wanted[0], rtol=0, atol=6e-3)
        np.testing.assert_allclose(sin[row], wanted[1], rtol=0, atol=6e-3)
    plain, _ = rope.rotation(jnp.asarray(positions), RopeConfig(), HEAD_DIM, POSITIONS)
    np.testing.assert_array_equal(cos[:2], plain[:2])
    assert np.abs(cos[2:] - plain[2:]).max() > 0.1


def test_rotated_products_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, HEAD_DIM)).astype(np.float32)

    def product(at_q, at_k):
        turned = [
            rope.rotate(jnp.asarray(x), *rope.rotation(jnp.full((1, 1), at), RopeConfig(), HEAD_DIM, POSITIONS))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-3)
    assert abs(product(9, 4) - product(9, 8)) > 1e-2


def test_bfloat16_is_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 2, HEAD_DIM)), jnp.bfloat16)
    cos, sin = rope.rotation(jnp.arange(5)[None], RopeConfig(), HEAD_DIM, POSITIONS)
    actual = rope.rotate(x, cos, sin)
    assert actual.dtype == jnp.bfloat16
    assert jax.numpy.array_equal(actual, rope.rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_unknown_kind():
    with pytest.raises(ValueError, match="'longrope' is not one of default"):
        rope.frequencies(RopeConfig(kind="longrope"), HEAD_DIM, POSITIONS)
