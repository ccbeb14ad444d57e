"""The TPU's compiler on layers of two kinds in one scan: branches copy nothing, and every op is its kernel."""

import jax
import jax.numpy as jnp
import pytest
from text_model import TextModel, text_batch
from tpu import compile_for, temporaries

import vlcache_jax as vlc
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig

ROWS, PROMPT, WINDOW = 8, 4096, 1024
CONFIG = DecoderConfig(  # the layers of Gemma 3 4B, a small vocabulary
    family="gemma3",
    vocab_size=1024,
    hidden_size=2560,
    intermediate_size=10240,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    rope=RopeConfig(theta=1e6, kind="linear", factor=8.0),
    window_rope=RopeConfig(theta=1e4),
    windows=tuple(None if i % 6 == 5 else WINDOW for i in range(34)),
    max_positions=32768,
    tie_embeddings=True,
    activation="gelu_pytorch_tanh",
    qk_norm=True,
    branch_norms=True,
    one_plus_norms=True,
    embedding_scale=2560**0.5,
)
MODEL = TextModel(CONFIG, dtype="bfloat16")


def shapes():
    batch = text_batch([PROMPT] * ROWS, PROMPT)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    params = jax.eval_shape(lambda b: MODEL.init(jax.random.key(0), b), batch)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), params)
    return params, batch


@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(budget=0.1)], ids=["full", "10 %"])
def test_a_step_copies_nothing(policy):
    params, batch = shapes()
    _, state = jax.eval_shape(lambda p, b: vlc.prefill(MODEL, p, b, policy).start(256), params, batch)
    full, windows = 5 * PROMPT, 29 * WINDOW
    slots = full + windows if policy.keeps_all else full // 10 + windows
    assert state.context.keys.shape[2] == pytest.approx(slots, abs=PROMPT if policy.keeps_all else 34 * 16)
    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    program = compile_for("v5e:2x2", lambda p, t, s: vlc.decode_step(MODEL, p, t, s), params, tokens, state)
    assert "tpu_custom_call" in program.as_text()
    assert temporaries(program) < 0.05 * state.context.nbytes


@pytest.mark.thorough
def test_prefill_runs_the_kernels_of_both_kinds():
    params, batch = shapes()
    policy = vlc.VLCache(budget=0.1, candidate_fraction=0.3)
    program = compile_for("v5e:2x2", lambda p, b: vlc.prefill(MODEL, p, b, policy).start(256), params, batch)
    text = program.as_text()
    assert "splash" in text
    assert "column_statistics" in text
    assert " conditional(" in text


@pytest.mark.parametrize(
    "policy",
    [
        vlc.H2O(budget=0.1, decoding="evict"),
        pytest.param(vlc.SnapKV(budget=0.1, decoding=vlc.Recompress(WINDOW)), marks=pytest.mark.thorough),
    ],
    ids=["evict", "recompress"],
)
def test_a_step_of_a_rule_that_rewrites_copies_no_state(policy):
    params, batch = shapes()
    _, state = jax.eval_shape(lambda p, b: vlc.prefill(MODEL, p, b, policy).start(256), params, batch)
    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    step = lambda p, t, s: vlc.decode_step(MODEL, p, t, s)  # noqa: E731
    program = compile_for("v5e:2x2", step, params, tokens, state, donate=(2,))
    assert temporaries(program) < 0.3 * state.context.nbytes
