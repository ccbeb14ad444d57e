"""`vlcache-jax evaluate` in processes of its own, which are killed, or of which there are several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

from vlcache_jax.cli.main import main

pytestmark = pytest.mark.thorough
SAMPLES, POLICIES = 60, ("vl_cache:0.3", "full_cache")
SECONDS = 300


class Evaluation:
    """The command, and what a run of it that nothing stopped found."""

    def __init__(self, folder):
        self.folder = folder
        make_tiny_llava(folder / "checkpoint")
        rng = np.random.default_rng(0)
        lines = []
        for i in range(SAMPLES):
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            lines.append({"id": f"s{i}", "images": [f"{i}.png"], "question": f"w{i % 57} w2", "answers": ["w1", "w7"]})
        lines[9]["images"] = ["missing.png"]
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.run(folder / "whole").wait(SECONDS)  # into the compilation cache
        start = time.monotonic()
        self.run(folder / "again").wait(SECONDS)
        self.seconds = time.monotonic() - start

    def command(self, out, *more):
        options = ["--max-new-tokens", "6", "--rows", "3", "--dtype", "float32", "--compare", POLICIES[1], *more]
        data = ["--model", str(self.folder / "checkpoint"), "--data", str(self.folder / "data.jsonl")]
        return ["evaluate", *data, "--policy", POLICIES[0], "--out", str(out), *options]

    def run(self, out, *more, **environment):
        own = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"), **environment}
        command = [sys.executable, "-m", "vlcache_jax", *self.command(out, *more)]
        return subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return Evaluation(tmp_path_factory.mktemp("evaluation"))


def table(out, capsys):
    capsys.readouterr()
    assert main(["report", str(out), "--compare", POLICIES[1]]) == 0
    return capsys.readouterr().out.replace(str(out), "RUN")


def ids(*files):
    """Of all whole lines; none twice."""
    found = []
    for file in files:
        for text in file.read_bytes().split(b"\n"):
            try:
                found.append(json.loads(text)["id"])
            except ValueError:
                continue
    assert len(found) == len(set(found))
    return found


def wait_until(condition, *processes):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def check_whole(evaluation, out, capsys):
    assert table(out, capsys) == table(evaluation.folder / "whole", capsys)
    for policy in POLICIES:
        name = f"{policy.replace(':', '-')}.jsonl"
        assert len(ids(*out.glob(name), *out.glob(f"part-*/{name}"))) == SAMPLES


@pytest.mark.parametrize("turn", range(4))
def test_kill_9_at_five_random_moments(evaluation, tmp_path, capsys, turn):
    """One after another, at any moment between the first line of the program and its end."""
    out, rng = tmp_path / "run", np.random.default_rng(turn)
    for _ in range(5):
        process = evaluation.run(out)
        time.sleep(float(rng.uniform(0, evaluation.seconds)))
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
    assert evaluation.run(out).wait(SECONDS) == 0
    check_whole(evaluation, out, capsys)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_of_slurm(evaluation, tmp_path, capsys):
    """JAX finds the others in Slurm's environment."""
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    shared["JAX_COORDINATOR_PORT"] = str(free_port())
    processes = [
        evaluation.run(tmp_path, "--distributed", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **shared) for i in range(2)
    ]
    assert [process.wait(SECONDS) for process in processes] == [0, 0]
    assert [len(ids(tmp_path / f"part-{i}-of-2" / "full_cache.jsonl")) for i in range(2)] == [SAMPLES // 2] * 2
    check_whole(evaluation, tmp_path, capsys)


@pytest.mark.parametrize("count", [2, 4])
def test_one_of_several_processes_is_killed(evaluation, tmp_path, capsys, count):
    """The others answer all of theirs; started again, it answers what is left."""
    address = f"127.0.0.1:{free_port()}"
    processes = [evaluation.run(tmp_path, "--distributed", f"{address},{i}/{count}") for i in range(count)]
    part = tmp_path / f"part-1-of-{count}"
    wait_until(lambda: (part / "vl_cache-0.3.jsonl").exists(), *processes)
    processes[1].send_signal(signal.SIGKILL)
    assert [process.wait(SECONDS) for process in processes] == [0, -signal.SIGKILL, *[0] * (count - 2)]
    left = len(ids(*tmp_path.glob("part-*/full_cache.jsonl")))
    assert SAMPLES - SAMPLES // count <= left < SAMPLES
    assert evaluation.run(tmp_path, "--share", f"1/{count}").wait(SECONDS) == 0
    check_whole(evaluation, tmp_path, capsys)
