"""Derivatives: of a prefill and of single steps they are those of the model's `forward`; of generated tokens none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc

# Of prompts this short, windows and sinks take much.
pytestmark = pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PolicyWarning")

ROWS, VOCAB = 2, 64
POLICIES = {
    "full_cache": vlc.FullCache(),
    "vl_cache": vlc.VLCache(budget=0.3),
    "look_m": vlc.LookM(budget=0.3),
    "zip_vl": vlc.ZipVL(budget=0.3),
    "h2o_evicts": vlc.H2O(budget=0.3, decoding="evict"),
}
MORE = {
    "vl_cache_candidates": vlc.VLCache(budget=0.3, candidate_fraction=0.5),
    "snap_kv_recompresses": vlc.SnapKV(budget=0.3, window=4, decoding=vlc.Recompress(4)),
    "snap_kv_quantises": vlc.SnapKV(budget=0.3, window=4, evicted=vlc.Quantise(4)),
    "ada_kv": vlc.AdaKV(budget=0.3, window=4),
    "pyramid_kv": vlc.PyramidKV(budget=0.3, window=4),
    "h2o": vlc.H2O(budget=0.3),
    "tova": vlc.TOVA(budget=0.3),
    "streaming_llm": vlc.StreamingLLM(budget=0.3),
    "prefix_kv": vlc.PrefixKV(budget=0.3),
    "air_cache": vlc.AirCache(budget=0.3),
    "mix_kv": vlc.MixKV(budget=0.3, window=4),
    "expected_attention": vlc.ExpectedAttention(budget=0.3, future=16),
    "key_norm": vlc.KeyNorm(budget=0.3),
    "key_difference": vlc.KeyDifference(budget=0.3),
    "mass": vlc.SnapKV(vlc.Mass(0.5, cap=0.4), window=4),
    "random": vlc.RandomEviction(budget=0.3),
}


@pytest.fixture(scope="module")
def tiny():
    """(model, parameters, batch, weights of the logits)."""
    model, params = tiny_llava(layers=2)
    weights = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    return model, jax.tree.map(jnp.asarray, params), ragged_batch(rows=ROWS, length=24, tiles=1), weights


def forward(tiny, params, batch):
    model, _, _, weights = tiny
    logits = model.apply({"params": params}, batch, method="forward")
    return jnp.sum(logits[np.arange(ROWS), np.asarray(batch.lengths) - 1] * weights)


@pytest.fixture(scope="module")
def expected(tiny):
    return jax.jit(jax.grad(lambda params: forward(tiny, params, tiny[2])))(tiny[1])


def check_prefill(tiny, expected, policy):
    model, params, batch, weights = tiny
    objective = lambda params: jnp.sum(vlc.prefill(model, params, batch, policy).start(4)[0] * weights)  # noqa: E731
    found = jax.jit(jax.grad(objective))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), found, expected)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_gradients_of_a_prefill_are_those_of_the_forward_pass(tiny, expected, policy):
    check_prefill(tiny, expected, policy)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", MORE.values(), ids=MORE)
def test_gradients_of_a_prefill_under_every_other_policy(tiny, expected, policy):
    check_prefill(tiny, expected, policy)


def test_forward_mode_and_plain_calls(tiny, expected):
    model, params, batch, weights = tiny
    objective = lambda params: jnp.sum(vlc.prefill(model, params, batch, POLICIES["vl_cache"]).start(4)[0] * weights)  # noqa: E731
    direction = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    _, along = jax.jit(lambda params: jax.jvp(objective, (params,), (direction,)))(params)
    total = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(direction)))
    np.testing.assert_allclose(along, total, rtol=1e-3)
    plain = jax.grad(objective)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), plain, expected)


def test_kept_keys_and_values_have_derivatives(tiny):
    """Those of the tokens that are kept, and of no other."""
    model, params, batch, _ = tiny

    def kept(params, policy):
        _, state = vlc.prefill(model, params, batch, policy).start(4)
        used = (state.context.positions >= 0)[..., None]
        return jnp.sum(jnp.where(used, state.context.values, 0))

    gradient = jax.jit(jax.grad(kept), static_argnums=1)
    part, whole = (gradient(params, policy) for policy in (POLICIES["vl_cache"], vlc.FullCache()))
    value = [x["decoder"]["layers"]["attention"]["value"]["kernel"] for x in (part, whole)]
    assert 0 < float(jnp.linalg.norm(value[0])) < float(jnp.linalg.norm(value[1]))


@pytest.mark.parametrize("policy", [POLICIES["full_cache"], POLICIES["h2o_evicts"]], ids=["full_cache", "h2o_evicts"])
def test_a_decode_step_is_differentiable(tiny, policy):
    model, params, batch, weights = tiny
    policy = dataclasses.replace(policy, budget=1.0) if policy.keeps_all else policy

    def two_steps(params):
        _, state = vlc.prefill(model, params, batch, policy).start(4)
        return jnp.sum(vlc.decode_step(model, params, jnp.full((ROWS,), 9), state)[0] * weights)

    found = jax.jit(jax.grad(two_steps))(params)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
    if not policy.keeps_all:
        return
    rows, end = np.arange(ROWS), np.asarray(batch.lengths)
    tokens, index = np.pad(batch.tokens, ((0, 0), (0, 1))), np.pad(batch.vision_index, ((0, 0), (0, 1)))
    tokens[rows, end], index[rows, end] = 9, -1
    longer = dataclasses.replace(batch, tokens=tokens, vision_index=index, lengths=end + 1)
    wanted = jax.jit(jax.grad(lambda params: forward(tiny, params, longer)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), found, wanted)


def answers(tiny, params):
    model, _, batch, _ = tiny
    return vlc.generate(model, params, batch, POLICIES["vl_cache"], 4).tokens


def asked(tiny, params):
    model, _, batch, _ = tiny
    return vlc.answer(vlc.compress(model, params, batch, POLICIES["vl_cache"]), None, 4).tokens


@pytest.mark.parametrize("generated", [answers, asked])
@pytest.mark.parametrize("compile", [jax.jit, lambda function: function], ids=["jit", "plain"])
def test_generated_tokens_refuse_derivatives_with_the_remedy(tiny, generated, compile):
    objective = lambda params: jnp.sum(generated(tiny, params).astype(jnp.float32))  # noqa: E731
    with pytest.raises(vlc.InputError, match=r"method='forward'.*stop_gradient"):
        compile(jax.grad(objective))(tiny[1])
    with pytest.raises(vlc.InputError, match=r"whole numbers"):
        compile(lambda params: jax.jvp(objective, (params,), (params,)))(tiny[1])


@pytest.mark.thorough
def test_a_rollout_inside_a_differentiated_function(tiny):
    """A policy gradient: the answer is drawn from constant parameters, its log-probabilities come from `forward`."""
    model, params, batch, _ = tiny
    start = np.asarray(batch.lengths)

    def loss(params):
        tokens = answers(tiny, jax.lax.stop_gradient(params))
        rows, length = jnp.arange(ROWS)[:, None], batch.length
        padded = jnp.pad(batch.tokens, ((0, 0), (0, 4)))
        whole = padded.at[rows, start[:, None] + jnp.arange(4)[None]].set(tokens)
        index = jnp.pad(batch.vision_index, ((0, 0), (0, 4)), constant_values=-1)
        longer = dataclasses.replace(batch, tokens=whole, vision_index=index, lengths=start + 4)
        logits = model.apply({"params": params}, longer, method="forward")
        logits = jnp.take_along_axis(logits, (start[:, None] - 1 + jnp.arange(4)[None])[..., None], axis=1)
        assert length + 4 == longer.length
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) > 0
    assert float(jnp.linalg.norm(gradient["decoder"]["layers"]["attention"]["value"]["kernel"])) > 0


def test_a_stream_is_refused_inside_a_traced_program(tiny):
    model, params, batch, _ = tiny
    with pytest.raises(vlc.InputError, match="use generate or decode"):
        jax.jit(lambda params: vlc.stream(model, params, batch, vlc.FullCache(), 4))(params)
