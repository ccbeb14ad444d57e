"""The train step: the loss counts answers only, packing equals asking alone, freezing, accumulation, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tiny_models import IMAGE_TOKEN, PATCHES, tiny_llava
from vlcache_jax.errors import InputError
from vlcache_jax.training import Conversation, TrainBatch, answer_loss, init_state, make_train_step, pack
from vlcache_jax.training.loss import answers_right, weighted_cross_entropy
from vlcache_jax.training.parts import merge, split

LENGTH = 48


@pytest.fixture(scope="module")
def tiny():
    model, params = tiny_llava(layers=2)
    return model, jax.tree.map(lambda x: x / 6 if x.ndim > 2 else x, params)


def conversations(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for row in range(rows):
        questions = [
            (rng.integers(6, 64, rng.integers(2, 6)).tolist(), rng.integers(6, 64, rng.integers(2, 5)).tolist())
            for _ in range(1 + row % 3)
        ]
        prefix = [1, 7] + [IMAGE_TOKEN] * PATCHES
        pixels = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
        result.append(Conversation(prefix, [-1, -1, *range(PATCHES)], questions, pixels))
    return result


def copied(tree):
    return jax.tree.map(lambda x: x + 0, tree)


def run(loss, params, batch, steps=3, optimizer=None, trainable=None, **options):
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    step = make_train_step(loss, optimizer, **options)
    tuned, frozen = split(copied(params), trainable)
    state = init_state(tuned, optimizer)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    return state._replace(params=merge(frozen, state.params)), losses


def test_loss_falls_on_one_batch(tiny):
    model, params = tiny
    _, losses = run(answer_loss(model), params, pack(conversations(), LENGTH), steps=12)
    assert losses[-1] < 0.7 * losses[0]


def test_packed_questions_give_the_logits_of_each_asked_alone(tiny):
    model, params = tiny
    conversation = conversations(3)[2]
    packed = pack([conversation], LENGTH)
    logits = model.apply({"params": params}, packed.batch, packed.positions, packed.segments, method="forward")
    for segment, question in enumerate(conversation.questions, start=1):
        alone = pack([conversation._replace(questions=[question])], LENGTH)
        alone_logits = model.apply({"params": params}, alone.batch, method="forward")
        np.testing.assert_allclose(
            logits[0][packed.segments[0] == segment], alone_logits[0][alone.segments[0] == 1], atol=2e-5
        )


def test_only_answer_tokens_count():
    batch = pack(conversations(2), LENGTH, first_weight=4.0)
    logits = jax.random.normal(jax.random.key(0), (2, LENGTH, 64))
    loss, metrics = weighted_cross_entropy(logits, batch)
    log_p = jax.nn.log_softmax(logits)
    total = weight = 0.0
    for row, conversation in enumerate(conversations(2)):
        at = len(conversation.prefix)
        for question, answer in conversation.questions:
            for i, token in enumerate(answer):
                w = 4.0 if i == 0 else 1.0
                total -= w * float(log_p[row, at + len(question) - 1 + i, token])
                weight += w
            at += len(question) + len(answer)
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)
    assert float(metrics["weight"]) == weight


def test_exact_match_needs_every_token_of_an_answer():
    batch = pack(conversations(3), LENGTH)
    logits = np.array(jax.nn.one_hot(batch.targets, 64))
    right, asked = answers_right(logits, batch)
    assert int(asked.sum()) == 1 + 2 + 3
    assert (right == asked).all()
    spoiled = int(np.flatnonzero((batch.segments[2] == 2) & (batch.weights[2] > 0))[-1])
    logits[2, spoiled] = -logits[2, spoiled]
    right, _ = answers_right(logits, batch)
    assert int(right.sum()) == 5
    assert not right[2, 2]


def test_frozen_parts_stay_and_have_no_optimizer_state(tiny):
    model, params = tiny
    trainable = ("decoder/layers/attention", "projector")
    state, _ = run(answer_loss(model), params, pack(conversations(), LENGTH), trainable=trainable)
    tuned, frozen = split(state.params, trainable)
    before_tuned, before_frozen = split(params, trainable)
    jax.tree.map(np.testing.assert_array_equal, frozen, before_frozen)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(before_tuned)))
    sizes = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert sizes == 2 * sum(x.size for x in jax.tree.leaves(tuned))


def test_split_and_merge_are_inverse_and_prefixes_are_whole_names(tiny):
    params = tiny[1]
    tuned, frozen = split(params, ("decoder/layers",))
    assert jax.tree.structure(merge(tuned, frozen)) == jax.tree.structure(params)
    with pytest.raises(InputError, match=r"'deco'.*decoder, projector, vision"):
        split(params, ("deco",))


def test_accumulated_gradients_equal_the_whole_batch(tiny):
    model, params = tiny
    batch, sgd = pack(conversations(), LENGTH, first_weight=3.0), optax.sgd(0.1)
    whole, _ = run(answer_loss(model), params, batch, steps=2, optimizer=sgd)
    parts, _ = run(answer_loss(model), params, batch, steps=2, optimizer=sgd, accumulate=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, parts.params)


@pytest.mark.filterwarnings("ignore:.* trainable parameters are bfloat16")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameters_of_several_dtypes_under_strict_promotion(accumulate):
    def loss(params, batch):
        value = jnp.sum((params["a"] * batch) ** 2) + jnp.sum(params["b"].astype(jnp.float32) * batch)
        return value, {"rows": jnp.asarray(len(batch))}

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = init_state({"a": jnp.ones((1,)), "b": jnp.ones((1,), jnp.bfloat16)}, optimizer)
    step = make_train_step(loss, optimizer, accumulate=accumulate)
    with jax.numpy_dtype_promotion("strict"):
        state, metrics = step(state, jnp.arange(4.0), None, jnp.float32(0.5))
    np.testing.assert_allclose(state.params["a"], 0.995, atol=1e-4)
    assert state.params["b"].dtype == jnp.bfloat16
    assert state.params["b"] < 1
    assert metrics["rows"] == 4 // accumulate


def test_accumulated_parts_are_rows_apart():
    """Rows of a batch that is split over devices stay where they are: a part has rows of every device."""
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), batch, ordered=True)
        return jnp.sum(params["w"] * jnp.mean(batch)), {}

    step = make_train_step(loss, optax.sgd(0.1), accumulate=4)
    state = init_state({"w": jnp.ones(())}, optax.sgd(0.1))
    step(state, jnp.arange(8.0))
    jax.effects_barrier()
    assert sorted(seen) == [[0.0, 4.0], [1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]


@pytest.mark.parametrize("axes", [None, (AxisType.Auto,), (AxisType.Explicit,)], ids=["device", "auto", "explicit"])
def test_the_second_step_compiles_nothing(axes):
    """Parameters as `vlc.load` returns them, on a device or a mesh: what is new of the state lies there, too."""
    place = jax.devices()[0] if axes is None else NamedSharding(jax.make_mesh((8,), ("fsdp",), axes), P("fsdp"))
    params, compiled = jax.device_put({"w": jnp.ones(8)}, place), []
    optimizer = optax.adam(1e-2)
    step = make_train_step(lambda params, batch: (jnp.sum((params["w"] * batch) ** 2), {}), optimizer)
    state, batch = step(init_state(params, optimizer), jnp.ones(8))[0], jnp.ones(8)
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        step(state, batch)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_draws_is_given_a_key_of_its_step_and_part(accumulate):
    """The same again from a state that was saved; another for every step and part."""

    def loss(params, batch, key):
        return params["w"] * jax.random.normal(key, ()) * jnp.mean(batch), {}

    def drawn(seed, steps):
        step = make_train_step(loss, optax.sgd(1.0), accumulate=accumulate, seed=seed)
        state, values = init_state({"w": jnp.zeros(())}, optax.sgd(1.0))._replace(step=jnp.int32(steps[0])), []
        for _ in steps:
            state = step(state, jnp.ones(4))[0]
            values.append(float(state.params["w"]))
        return np.diff([0, *values])

    values = drawn(3, range(4))
    np.testing.assert_allclose(drawn(3, range(2, 4)), values[2:], atol=1e-6)
    assert len({round(float(x), 6) for x in [*values, *drawn(4, range(4))]}) == 8


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True, "2", None])
def test_numbers_of_parts_that_are_none(accumulate):
    with pytest.raises(InputError, match=rf"accumulate={accumulate!r}: give a number of parts"):
        make_train_step(lambda params, batch: (0.0, {}), optax.sgd(0.1), accumulate=accumulate)


@pytest.mark.parametrize("compile", [jax.jit, lambda step: step], ids=["jit", "plain"])
def test_batches_that_cannot_be_divided(compile):
    optimizer = optax.sgd(0.1)

    def loss(params, batch):
        return jnp.sum(params["w"]) + jnp.sum(batch["x"]), {}

    state = init_state({"w": jnp.ones(())}, optimizer)
    step = compile(make_train_step(loss, optimizer, accumulate=3))
    with pytest.raises(InputError, match=r"accumulate=3 does not divide the batch's 8 rows: use one of \[1, 2, 4, 8\]"):
        step(state, {"x": jnp.zeros((8, 2))})
    for wrong in ({"x": jnp.zeros((6, 2)), "y": jnp.zeros((3,))}, {"x": jnp.zeros(())}, {}):
        with pytest.raises(InputError, match="disagree on the number of rows"):
            step(state, wrong)
    with pytest.raises(InputError, match="0 rows"):
        step(state, {"x": jnp.zeros((0, 2))})


@pytest.mark.parametrize("trainable", ["decoder", (), []])
def test_what_is_trainable_is_a_sequence_of_prefixes(trainable):
    with pytest.raises(InputError, match="give a sequence of path prefixes"):
        split({"decoder": {"w": jnp.ones(())}}, trainable)


def test_scale_multiplies_the_update(tiny):
    model, params = tiny
    optimizer = optax.adam(1e-2)
    step = make_train_step(answer_loss(model), optimizer)
    batch = pack(conversations(4), LENGTH)
    still, _ = step(init_state(copied(params), optimizer), batch, scale=0.0)
    jax.tree.map(np.testing.assert_array_equal, still.params, params)
    assert int(still.step) == 1


def test_eight_devices_train_as_one(tiny):
    model, params = tiny
    batch = pack(conversations(8), LENGTH, first_weight=2.0)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
    single, losses = run(answer_loss(model), params, batch, steps=2, optimizer=optimizer)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    sharded: TrainBatch = jax.device_put(batch, rows)
    spread, spread_losses = run(
        answer_loss(model), jax.device_put(params, everywhere), sharded, steps=2, optimizer=optimizer
    )
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread.params, single.params)
    assert len(spread.params["decoder"]["embed_tokens"]["embedding"].sharding.device_set) == 8


def test_questions_that_do_not_fit():
    some = conversations(3)
    short = pack(some, 30)
    assert short.segments.max() < 3  # later questions are left out
    with pytest.raises(InputError, match="raise the length"):
        pack(some, 20)
    with pytest.raises(InputError, match="empty"):
        pack([some[0]._replace(questions=[([5, 6], [])])], LENGTH)


def test_batch_fields_line_up():
    batch = pack(conversations(4), LENGTH, first_weight=4.0)
    for row in range(4):
        for column in np.flatnonzero(batch.weights[row]):
            assert batch.targets[row, column] == batch.batch.tokens[row, column + 1]
            assert batch.segments[row, column] == batch.segments[row, column + 1] > 0
            assert batch.positions[row, column] + 1 == batch.positions[row, column + 1]
    assert jnp.all(batch.batch.lengths <= LENGTH)
