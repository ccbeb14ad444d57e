"""Saving, resuming bit for bit, and refusing what does not fit; progress; prefetching."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.training import (
    ProgressLog,
    init_state,
    load_state,
    make_train_step,
    prefetch,
    save_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* trainable parameters are bfloat16")  # one, to be kept bit for bit


def regression(params, batch):
    bias = params["b"].astype(jnp.float32)[None]
    return jnp.mean((batch["x"] @ params["w"]["kernel"] + bias - batch["y"]) ** 2), {}


def batches(start=0):
    for number in range(start, 100):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(16, 3)).astype(np.float32)
        yield {"x": x, "y": x.sum(1, keepdims=True)}


@pytest.fixture
def training():
    optimizer = optax.adamw(3e-2)
    params = {"w": {"kernel": jnp.zeros((3, 1))}, "b": jnp.zeros(1, jnp.bfloat16)}
    return make_train_step(regression, optimizer), lambda: init_state(jax.tree.map(jnp.copy, params), optimizer)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_resumed_run_equals_the_uninterrupted_one(training, tmp_path):
    step, new = training
    state = new()
    for number, batch in zip(range(10), batches()):
        state, _ = step(state, batch)
        if number == 3:
            save_state(tmp_path / "run" / "state", state, {"step": 4, "note": "é"})
    resumed, progress = load_state(tmp_path / "run" / "state", new())
    assert progress == {"step": 4, "note": "é"}
    for _, batch in zip(range(6), batches(progress["step"])):
        resumed, _ = step(resumed, batch)
    assert_same(resumed, state)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state"]
    assert {path.name for path in (tmp_path / "run" / "state").iterdir()} == {"arrays-1", "state.safetensors"}


def test_a_crash_while_saving_leaves_the_earlier_state(training, tmp_path, monkeypatch):
    _, new = training
    path = tmp_path / "state"
    save_state(path, new(), {"step": 1})

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="no space"):
        save_state(path, new(), {"step": 2})
    assert load_state(path, new())[1] == {"step": 1}
    monkeypatch.undo()
    (path / "arrays-7").mkdir()  # of a run that was killed
    save_state(path, new(), {"step": 2})
    assert load_state(path, new())[1] == {"step": 2}
    assert {path.name for path in path.iterdir()} == {"arrays-8", "state.safetensors"}


def test_states_in_the_background(training, tmp_path, monkeypatch):
    """Steps that take the state's memory go on meanwhile; readers and the next writer wait; errors are not lost."""
    step, new = training
    path, state, kept = tmp_path / "state", new(), []
    for number, batch in zip(range(3), batches()):
        state, _ = step(state, batch)
        kept.append(jax.tree.map(np.array, state))
        saving = save_state(path, state, {"step": number}, background=True)
    state, _ = step(state, next(batches(3)))  # donates what is being written
    loaded, progress = load_state(path, state)
    assert progress == {"step": 2}
    assert_same(loaded, kept[2])
    saving.wait()
    assert len(list(path.iterdir())) == 2

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="no space"):
        save_state(path, state, background=True).wait()
    save_state(path, state, background=True)
    with pytest.raises(InputError, match="no space"):
        load_state(path, state)
    monkeypatch.undo()
    assert load_state(path, new())[1] == {"step": 2}


def test_states_that_do_not_fit(training, tmp_path):
    _, new = training
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match=r"no train state at .*state"):
        load_state(path, new())
    save_state(path, new())
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        load_state(path, new().params)
    wider = new()._replace(params={"w": {"kernel": jnp.zeros((4, 1))}, "b": jnp.zeros(1, jnp.bfloat16)})
    with pytest.raises(CheckpointError, match=r"kernel.*\[3, 1\].*\[4, 1\]"):
        load_state(path, wider)
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=r"not a valid safetensors file.*delete it to start afresh"):
        load_state(path, new())


def test_sharding_is_taken_over(training, tmp_path):
    _, new = training
    save_state(tmp_path / "state", new())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state, _ = load_state(tmp_path / "state", jax.device_put(new(), everywhere))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))
    assert_same(state, new())


def test_any_types_shapes_and_meshes(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    whole = {
        "w": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8),
        "a/b.c": jnp.float32(0.1),
        "none": jnp.zeros((0, 3)),
        "on": jnp.array([True, False]),
        "bits": jnp.array([0, 2**32 - 1], jnp.uint32),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "number": 7,
    }
    save_state(tmp_path, whole | {"w": jax.device_put(whole["w"], split)})
    like = {name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype) for name, x in whole.items()}
    loaded, _ = load_state(tmp_path, like)
    assert loaded["none"].shape == (0, 3)
    assert_same(loaded, jax.tree.map(jnp.asarray, whole))
    turned = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", "data"))
    loaded, _ = load_state(tmp_path, like | {"w": jax.device_put(whole["w"], turned)})
    assert loaded["w"].sharding == turned
    np.testing.assert_array_equal(loaded["w"], whole["w"])


def test_progress_is_one_json_object_a_line(tmp_path, capsys):
    log = ProgressLog(tmp_path / "logs" / "log.jsonl")
    log.count(500)
    log.report(step=1, loss=0.1234567)
    log.report(step=2, loss=2.0)
    first, second = (json.loads(line) for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines())
    assert (first["step"], first["loss"]) == (1, 0.12346)
    assert first["tokens_per_second"] > 0
    assert "tokens_per_second" not in second
    assert "step 2  loss 2.0" in capsys.readouterr().err


def test_prefetch_keeps_order_passes_errors_on_and_stops_its_thread():
    assert list(prefetch(iter(range(20)), 3)) == list(range(20))

    def broken():
        yield 1
        raise ValueError("no more data")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more data"):
        next(items)

    before = set(threading.enumerate())
    endless = prefetch(iter(int, 1))
    next(endless)
    (own,) = set(threading.enumerate()) - before
    endless.close()
    own.join(timeout=10)
    assert not own.is_alive()
