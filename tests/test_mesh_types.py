"""Meshes with axes of every type: Explicit, as of `jax.make_mesh`, Auto, both, and Manual ones of a `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_training_step import conversations
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.training.batch import pack
from vlcache_jax.training.loss import answer_loss, make_eval_step
from vlcache_jax.training.state import init_state, make_train_step

# Of prompts this short, windows and sinks take much.
pytestmark = pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PolicyWarning")

NEW, ROWS = 4, 4
POLICY = vlc.VLCache(budget=0.4)
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
MIXED = [(EXPLICIT, AUTO), (AUTO, EXPLICIT)]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(layers=1)


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=ROWS, length=24, tiles=1)


QUESTIONS = vlc.Continuation(np.full((ROWS, 2, 3), 9, np.int32), np.full((ROWS, 2), 3, np.int32))


@pytest.fixture(scope="module")
def expected(llava, batch):
    """Of one device: (tokens, answers to questions, logits of `forward`)."""
    model, params = llava
    context = vlc.compress(model, params, batch, POLICY)
    return (
        np.asarray(vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=[]).tokens),
        np.asarray(vlc.answer(context, QUESTIONS, NEW, eos_token_ids=[]).tokens),
        np.asarray(jax.jit(lambda p, b: model.apply({"params": p}, b, method="forward"))(params, batch)),
    )


def placed(llava, batch, kinds):
    """(mesh, parameters, batch)."""
    model, params = llava
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=kinds)
    params = jax.device_put(params, param_shardings(model.abstract_params(), mesh))
    return mesh, params, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def check_generate(llava, batch, expected, kinds):
    """Plainly, inside a program of one's own, and inside the mesh's context."""
    model, _ = llava
    mesh, params, rows = placed(llava, batch, kinds)
    plain = vlc.generate(model, params, rows, POLICY, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(plain.tokens, expected[0])
    assert plain.tokens.sharding.mesh.axis_types == kinds
    assert plain.report.replicated == ()
    program = jax.jit(lambda p, b: vlc.generate(model, p, b, POLICY, NEW, eos_token_ids=[]).tokens)
    np.testing.assert_array_equal(program(params, rows), expected[0])
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(program(params, rows), expected[0])
        np.testing.assert_array_equal(program(params, batch), expected[0])  # a batch that nobody placed


def check_steps(llava, batch, expected, kinds):
    model, _ = llava
    _, params, rows = placed(llava, batch, kinds)
    stream = vlc.stream(model, params, rows, POLICY, NEW, eos_token_ids=[])
    np.testing.assert_array_equal(np.stack(list(stream), axis=1), expected[0])
    logits, state = vlc.prefill(model, params, rows, POLICY).start(NEW)
    assert state.context.keys.sharding.shard_shape(state.context.keys.shape)[:2] == (ROWS // 2, 1)
    assert state.kept_positions(0).shape[:2] == (ROWS, 2)
    tokens = [jnp.argmax(logits, axis=-1)]
    for _ in range(NEW - 1):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[0])


def check_context(llava, batch, expected, kinds):
    model, _ = llava
    mesh, params, rows = placed(llava, batch, kinds)
    context = vlc.compress(model, params, rows, POLICY)
    for questions in (QUESTIONS, jax.device_put(QUESTIONS, NamedSharding(mesh, PartitionSpec("data")))):
        out = vlc.answer(context, questions, NEW, eos_token_ids=[])
        np.testing.assert_array_equal(out.tokens, expected[1])
    longer = vlc.extend(context, questions, out)
    longer = vlc.extend(longer, vlc.answer(longer, None, NEW, eos_token_ids=[]))
    assert vlc.answer(longer, None, NEW, samples=2, sampling=vlc.Sampling()).tokens.shape == (2 * ROWS, 2, NEW)


@pytest.mark.filterwarnings("ignore::vlcache_jax.errors.PlacementWarning")  # 4 rows, 8 devices
@pytest.mark.parametrize("params_placed", [True, False])
def test_more_samples_than_rows_on_explicit_axes(params_placed, llava, batch):
    """The answers of all rows split over devices which the rows alone would not fill; nobody need place anything."""
    model, params = llava
    mesh = jax.make_mesh((8,), ("data",), axis_types=(EXPLICIT,))
    if params_placed:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    full = vlc.compress(*llava, batch)
    alone = vlc.answer(full, None, NEW, samples=4, sampling=vlc.Sampling(), seeds=3)
    with jax.set_mesh(mesh):
        context = vlc.compress(model, params, batch)
        out = vlc.answer(context, None, NEW, samples=4, sampling=vlc.Sampling(), seeds=3, log_probabilities=True)
        np.testing.assert_array_equal(out.tokens, alone.tokens)
        scores, apart = vlc.score(context, out), vlc.divergence(context, context, out)
    np.testing.assert_allclose(scores.log_probabilities, out.log_probabilities, atol=1e-4)
    np.testing.assert_allclose(apart.log_probabilities, out.log_probabilities, atol=1e-4)


def check_forward(llava, batch, expected, kinds):
    model, _ = llava
    mesh, params, rows = placed(llava, batch, kinds)
    forward = lambda p, b: model.apply({"params": p}, b, method="forward")  # noqa: E731
    for run in (forward, jax.jit(forward)):
        np.testing.assert_allclose(run(params, rows), expected[2], atol=1e-4)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda p, b: jnp.mean(forward(p, b) ** 2)))(params, rows)
    single = jax.jit(jax.grad(lambda p, b: jnp.mean(forward(p, b) ** 2)))(llava[1], batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, single)


def check_training(llava, batch, expected, kinds):
    model, params = llava
    optimizer, conversation = optax.adam(1e-2), pack(conversations(8), 48)
    step = make_train_step(answer_loss(model), optimizer, accumulate=2)
    _, split, rows = placed(llava, conversation, kinds)
    copies = jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.copy, split)
    losses = []
    for start, data in zip(copies, (conversation, rows)):
        places = jax.tree.map(lambda x: x.sharding, start)
        state, metrics = step(init_state(start, optimizer), data)
        losses.append(float(metrics["loss"]))
        assert all(
            jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state.params, places))
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    right, asked = make_eval_step(model)(split, rows)
    assert right.shape == asked.shape == (8, 48)


CHECKS = [check_generate, check_steps, check_context, check_forward, check_training]


@pytest.mark.parametrize("check", [CHECKS[1], *later(*CHECKS[:1], *CHECKS[2:])])
def test_explicit_axes(check, llava, batch, expected):
    check(llava, batch, expected, (EXPLICIT, EXPLICIT))


@pytest.mark.thorough
@pytest.mark.parametrize("kinds", MIXED, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_axes_of_both_types(check, kinds, llava, batch, expected):
    check(llava, batch, expected, kinds)


METHODS = {
    "full_cache": vlc.FullCache(),
    "look_m": vlc.LookM(budget=0.4),
    "zip_vl": vlc.ZipVL(budget=0.4),
    "ada_kv": vlc.AdaKV(budget=0.4, window=4, lanes=2),
    "h2o_evicts": vlc.H2O(budget=0.4, decoding="evict"),
    "snap_kv_recompresses": vlc.SnapKV(budget=0.4, window=4, decoding=vlc.Recompress(2)),
    "snap_kv_quantises": vlc.SnapKV(budget=0.4, window=4, evicted=vlc.Quantise(4)),
    "expected_attention": vlc.ExpectedAttention(budget=0.4, future=16),
    "air_cache": vlc.AirCache(budget=0.4),
}
methods = pytest.mark.parametrize("policy", METHODS.values(), ids=METHODS)


def plain_tokens(llava, batch, policy):
    return vlc.generate(*llava, batch, policy, NEW, eos_token_ids=[]).tokens


@pytest.mark.thorough
@methods
def test_explicit_axes_for_every_part(policy, llava, batch):
    _, params, rows = placed(llava, batch, (EXPLICIT, EXPLICIT))
    tokens = vlc.generate(llava[0], params, rows, policy, NEW, eos_token_ids=[]).tokens
    np.testing.assert_array_equal(tokens, plain_tokens(llava, batch, policy))


# jax.shard_map with its default check_vma=True: every value says over which axes it varies.


ROWS_SPLIT = PartitionSpec("data")
PARAMS_AND_ROWS = (PartitionSpec(), ROWS_SPLIT)


def mapped(function, inputs, *names, outputs=ROWS_SPLIT, **options):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(AUTO,) * 2)
    options |= {"in_specs": inputs, "out_specs": outputs, "axis_names": set(names or mesh.axis_names)}
    return jax.jit(jax.shard_map(function, mesh=mesh, **options))


def check_shard_map(llava, batch, policy, *names, **options):
    model, params = llava

    def generate(params, batch):
        return vlc.generate(model, params, batch, policy, NEW, eos_token_ids=[]).tokens

    tokens = mapped(generate, PARAMS_AND_ROWS, *names, **options)(params, batch)
    np.testing.assert_array_equal(tokens, plain_tokens(llava, batch, policy))


def test_inside_a_shard_map(llava, batch):
    check_shard_map(llava, batch, POLICY)


def test_inside_a_shard_map_over_some_axes(llava, batch):
    """Checked, JAX itself refuses its binary search there; the whole cache needs none."""
    check_shard_map(llava, batch, vlc.FullCache(), "data")
    check_shard_map(llava, batch, POLICY, "data", check_vma=False)
    with pytest.raises(vlc.InputError, match=r"'model' left to the compiler.*check_vma=False"):
        check_shard_map(llava, batch, POLICY, "data")


@pytest.mark.thorough
@methods
def test_every_part_inside_a_shard_map(policy, llava, batch):
    check_shard_map(llava, batch, policy)


def test_answers_inside_a_shard_map(llava, batch, expected):
    model, params = llava

    def answer(params, batch, questions):
        return vlc.answer(vlc.compress(model, params, batch, POLICY), questions, NEW, eos_token_ids=[]).tokens

    program = mapped(answer, (*PARAMS_AND_ROWS, ROWS_SPLIT))
    np.testing.assert_array_equal(program(params, batch, QUESTIONS), expected[1])


def test_gradients_inside_a_shard_map(llava, batch):
    """`check_vma` adds up the gradients of parameters that all devices share."""
    model, params = llava

    def loss(params, batch):
        logits = model.apply({"params": params}, batch, method="forward")
        return jnp.sum(logits**2) + jnp.sum(vlc.prefill(model, params, batch, POLICY).start(NEW)[0] ** 2)

    found = mapped(jax.grad(loss), PARAMS_AND_ROWS, outputs=PartitionSpec())(params, batch)
    single = jax.jit(jax.grad(loss))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), found, single)
