"""Two processes of four devices each, over the local network: what each can see of the results, and the same tokens."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vlcache_jax as vlc

NEW, ROWS, SECONDS = 4, 8, 400
QUESTIONS = vlc.Continuation(np.full((ROWS, 2, 3), 9, np.int32), np.full((ROWS, 2), 3, np.int32))
POLICY = vlc.VLCache(budget=0.4)


def inputs():
    from tiny_models import ragged_batch, tiny_llava

    model, params = tiny_llava(layers=1)
    return model, params, ragged_batch(rows=ROWS, length=24, tiles=1)


def run(model, params, batch, whole, report):
    """Everything that reads arrays on the host. `whole` makes a numpy array of one of any number of processes."""
    out = vlc.generate(model, params, batch, POLICY, NEW, eos_token_ids=[])
    report("generate", np.asarray(out.tokens).tolist())  # without gathering anything
    report("kept", np.asarray(out.report.kept).tolist())
    sampled = vlc.generate(model, params, batch, POLICY, NEW, sampling=vlc.Sampling(), seeds=list(range(ROWS)))
    report("sampled", np.asarray(sampled.tokens).tolist())
    stream = vlc.stream(model, params, batch, POLICY, NEW, eos_token_ids=[])
    report("stream", np.stack(list(stream), axis=1).tolist())
    context = vlc.compress(model, params, batch, POLICY)
    answers = vlc.answer(context, QUESTIONS, NEW, eos_token_ids=[])
    report("answer", np.asarray(answers.tokens).tolist())
    longer = vlc.extend(context, QUESTIONS, answers)
    report("turn", np.asarray(vlc.answer(longer, None, NEW, samples=2, sampling=vlc.Sampling()).tokens).tolist())
    logits, state = vlc.prefill(model, params, batch, POLICY).start(NEW)
    logits, state = vlc.decode_step(model, params, np.full((ROWS,), 9, np.int32), state)
    report("step", np.argmax(whole(logits), axis=-1).tolist())
    positions = whole(state.kept_positions(0))
    report("positions", [row[row >= 0].tolist() for row in positions.reshape(len(positions), -1)])
    report("forward", float(np.abs(whole(model.apply({"params": params}, batch, method="forward"))).mean().round(4)))


def load(mesh, whole, report):
    """The demo's checkpoint, each process its own parts."""
    vlm = vlc.load(Path(vlc.__file__).parent / "assets" / "demo_model", dtype="float32", mesh=mesh, layout="stacked")
    layers = vlm.params["decoder"]["layers"]
    for name, kernel in (("query", layers["attention"]["query"]["kernel"]), ("down", layers["mlp"]["down"]["kernel"])):
        report(name, float(whole(kernel).astype(np.float64).sum()))


def train(model, params, batch, place, folder, report):
    """A step, and its state through a file."""
    import jax
    import jax.numpy as jnp
    import optax

    from vlcache_jax.training import init_state, load_state, make_train_step, save_state

    def loss(params, batch):
        return jnp.mean(model.apply({"params": params}, batch, method="forward") ** 2), {}

    step = make_train_step(loss, optax.sgd(0.1))
    state, metrics = step(init_state(params, optax.sgd(0.1)), place(batch))
    report("loss", round(float(metrics["loss"]), 4))
    save_state(f"{folder}/state", state)
    jax.experimental.multihost_utils.sync_global_devices("saved")
    again, _ = load_state(f"{folder}/state", state)
    report("again", round(float(step(again, place(batch))[1]["loss"]), 4))


def process(number, port, folder):
    """What one of the processes does."""
    import jax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, initialization_timeout=120)
    assert (jax.process_count(), jax.local_device_count()) == (2, 4)
    from vlcache_jax.parallel.params import param_shardings

    model, params, batch = inputs()
    results = {}

    def whole(x):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    def report(name, value):
        results[name] = value

    def place(tree):
        own = slice(4 * number, 4 * number + 4)  # this process' rows
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)[own]), tree)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    shardings = param_shardings(model.abstract_params(), mesh)
    put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])  # noqa: E731
    placed = jax.tree.map(put, params, shardings)
    load(mesh, whole, report)
    run(model, placed, place(batch), whole, report)
    context = vlc.compress(model, placed, place(batch), POLICY)
    with pytest.raises(vlc.InputError, match=r"several processes.*process_allgather"):
        vlc.save_context(context, f"{folder}/context-{number}")
    train(model, placed, batch, place, folder, report)
    Path(folder, f"{number}.json").write_text(json.dumps(results))


def test_two_processes_say_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append("--xla_force_host_platform_device_count=4")
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(port), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    expected = {}
    model, params, batch = inputs()
    load(None, np.asarray, expected.__setitem__)
    run(model, params, batch, np.asarray, expected.__setitem__)
    end, output = time.monotonic() + SECONDS, ""
    try:
        for one in processes:
            output += one.communicate(timeout=max(1, end - time.monotonic()))[0]
    finally:
        for one in processes:
            one.kill()
    assert [one.returncode for one in processes] == [0, 0], output
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert found[0] == found[1]
    assert found[0]["again"] < found[0]["loss"]
    assert {name: value for name, value in found[0].items() if name in expected} == expected


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
