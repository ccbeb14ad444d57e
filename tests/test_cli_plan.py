"""`vlcache-jax plan`: the page, the JSON object and the errors. A config.json is all it needs of a model."""

import json

import pytest
import tpu  # noqa: F401  (left out where the TPU compiler is not published)

from vlcache_jax.cli import plan_training as cli
from vlcache_jax.cli.main import main
from vlcache_jax.planning.programs import Program, Programs
from vlcache_jax.planning.training import RolloutPlan, TrainPlan
from vlcache_jax.training.lora import Lora

CONFIG = {
    "model_type": "llava",
    "image_token_index": 5,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
SMALL = ["--topology", "v5e:1x1", "--batch", "2", "--prompt", "64", "--new", "16"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(tmp_path)


@pytest.fixture
def quick_compiler(monkeypatch):
    """A compiler that answers at once; the real one is in test_planning.py."""

    def compile_(_, work, policy):
        fits = work.batch * work.prompt <= 2**14
        size = 2**20 * work.batch * work.prompt
        return Program(
            argument_bytes=size if fits else None,
            output_bytes=0 if fits else None,
            alias_bytes=0 if fits else None,
            temporary_bytes=0 if fits else None,
            peak_bytes=size,
            compile_seconds=1.0,
            refused=None if fits else "RESOURCE_EXHAUSTED: too large",
        ), None

    for name in ("prefill", "decode", "decode_step"):
        monkeypatch.setattr(Programs, name, compile_)


def test_page(folder, capsys):
    """The real compiler."""
    status = main(["plan", "--model", folder, *SMALL, "--policy", "full_cache", "--no-search"])
    out, err = capsys.readouterr()
    assert status == 0
    assert "on v5e:1x1 (data 1 x model 1)" in out
    assert "16.00 of memory, of which the compiler lets a program use 15.75" in out
    assert [line.split()[-1] for line in out.splitlines() if line.strip().startswith("fits")] == ["yes"]
    assert [line.split("] ")[1].split(",")[0] for line in err.splitlines() if "compiled in" in line] == [
        "prefill",
        "decoding",
        "decode step",
    ]


@pytest.mark.usefixtures("quick_compiler")
def test_json(folder, capsys):
    status = main(["plan", "--model", folder, *SMALL, "--compare", "full_cache", "--compare", "snap_kv:48", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert set(found) == {
        "model", "parameters", "topology", "devices", "devices_per_chip", "mesh", "dtype", "batch", "prompt",
        "new_tokens", "weights", "tiles", "hbm_bytes", "available_bytes", "hbm_bytes_per_second",
        "weight_bytes", "policies", "versions",
    }  # fmt: skip
    assert [(p["policy"], p["budget"]) for p in found["policies"]] == [
        ("ranked_bits", "30 % of the bytes"), ("full_cache", 1.0), ("snap_kv", "48 tokens a layer"),
    ]  # fmt: skip
    for policy in found["policies"]:
        assert set(policy) == {
            "recipe", "policy", "budget", "fits", "context_bytes", "tail_bytes", "peak_bytes", "prefill", "decode",
            "decode_step", "step_read_bytes", "bound_tokens_per_second", "largest_batch", "longest_prompt",
            "replicated",
        }  # fmt: skip
        assert set(policy["prefill"]) == {
            "argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "peak_bytes", "compile_seconds",
            "implementations", "refused",
        }  # fmt: skip
        assert policy["largest_batch"]["fits"] == 252  # 15.75 GiB at 64 MiB a row
    assert set(found["versions"]) == {"jax", "libtpu"}


@pytest.mark.usefixtures("quick_compiler")
def test_page_of_what_does_not_fit(folder, capsys):
    arguments = ["--topology", "v5e:1x1", "--batch", "300", "--prompt", "64", "--new", "16", "--compare", "full_cache"]
    assert main(["plan", "--model", folder, *arguments]) == 0
    out, err = capsys.readouterr()
    rows = {line.strip()[:16].strip(): line.split() for line in out.splitlines()}
    assert rows["fits"][-2:] == ["no", "no"]
    assert "RESOURCE_EXHAUSTED: too large" in out
    assert "does not fit" in err


def error_of(err):
    """The one error among the lines of progress."""
    errors = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(errors) == 1, err
    assert errors[0].startswith("vlcache-jax: error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llava-1.6-mistral"], "use one of llava-v1.6-mistral-7b"),
        (["--topology", "v5:2x4"], "is no known TPU: use one of v5"),
        (["--topology", "v5e"], "as in v5e:2x2"),
        (["--policy", "vl_cahce"], "did you mean 'vl_cache'?"),
        (["--policy", "vl_cache:1.5"], "budget=1.5 is out of range"),
        (["--compare", "fulll"], "did you mean 'full_cache'?"),
        (["--compare", "vl_cache:much"], "'much' is not a budget"),
        (["--compare", "vl_cache:" + "9" * 400], "is not a budget"),
        (["--mesh", "data=" + "9" * 30], "is out of range"),
        (["--mesh", "data=1,data=1"], "names 'data' twice"),
        (["--mesh", "model"], "is not of the form data=2,model=4"),
        (["--mesh", "modle=1"], "mesh axis 'modle' is not known"),
        (["--mesh", "model=2"], "their product must; try data=1,model=1"),
        (["--batch", "0"], "argument --batch: '0' is out of range"),
        (["--prompt", "512"], "need 528 positions but the model has 512"),
        (["--max-compilations", "0"], "argument --max-compilations: '0' is out of range"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_errors(folder, capsys, arguments, message):
    assert main(["plan", "--model", folder, *SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert error_of(err).count(message) == 1


def test_without_libtpu(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "--model", folder, *SMALL]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_folder_without_config(tmp_path, capsys):
    assert main(["plan", "--model", str(tmp_path), *SMALL]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.fixture
def quick_training(monkeypatch):
    """What the compiler says, at once; the real one is in `test_training_and_rollouts`."""
    asked = []

    def step(model, topology, mesh, **options):
        asked.append({"remat": model.remat, "mesh": mesh, **options})
        program = Program(peak_bytes=2**30, temporary_bytes=2**29, compile_seconds=1.0)
        return TrainPlan(step=program, frozen_bytes=2**28, state_bytes=2**27, available_bytes=2**34), None

    def rollouts(model, topology, mesh, *, policy, **options):
        asked.append({"mesh": mesh, **options})
        program = Program(peak_bytes=int(2**35 * policy.budget), temporary_bytes=2**29, compile_seconds=1.0)
        plan = {"policy": policy.name, "budget": policy.budget, "weight_bytes": 2**28, "available_bytes": 2**34}
        return RolloutPlan(program=program, **plan)

    monkeypatch.setattr(cli, "plan_training", step)
    monkeypatch.setattr(cli, "plan_rollouts", rollouts)
    return asked


def test_pages_of_training(folder, capsys, quick_training):
    shape = ["plan", "--model", folder, "--topology", "v5e:2x2", "--batch", "4", "--prompt", "64"]
    assert main([*shape, "--train", "lora:8", "--accumulate", "2", "--remat", "layers"]) == 0
    out = capsys.readouterr().out
    assert "on v5e:2x2 (fsdp 4)\na train step of lora:8, 64 tokens each, remat layers, accumulate 2, batch 4" in out
    assert [line.split()[-1] for line in out.splitlines()[3:]] == ["0.25", "0.12", "0.50", "1.00", "1", "yes"]
    assert main([*shape, "--train", "decoder/layers, projector", "--mesh", "data=2,model=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main([*shape, "--rollouts", "8", "--new", "16", "--policy", "vl_cache", "--compare", "full_cache"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows[0] == ["vl_cache", "10", "%", "full_cache"]
    assert rows[-1] == ["fits", "yes", "no"]
    first, second, *drawn = quick_training
    assert (first["lora"], first["remat"], first["accumulate"]) == (Lora(rank=8), "layers", 2)
    assert (second["trainable"], second["mesh"]) == (("decoder/layers", "projector"), {"data": 2, "model": 2})
    assert [(x["samples"], x["new_tokens"], x["mesh"]) for x in drawn] == [(8, 16, {"data": 2, "model": 2})] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "lora:many"], "is not of the form lora:RANK"),
        (["--train", "decoders"], "trainable prefix 'decoders' names no parameter"),
        (["--train", "all", "--remat", "some"], "--remat 'some' is not known: use none, projections, layers"),
        (["--train", "all", "--rollouts", "2"], "plan one after the other"),
        (["--rollouts", "2", "--policy", "vl_cache+fast_v"], "pruning are not planned"),
        (["--train", "all", "--mesh", "data=3"], "does not make up the 4 devices"),
        (["--train", "all", "--batch", "3"], "batch=3 cannot be split over 4 devices"),
    ],
)
def test_errors_of_training(folder, capsys, arguments, message):
    shape = ["--topology", "v5e:2x2", "--batch", "4", "--prompt", "64"]
    assert main(["plan", "--model", folder, *shape, *arguments]) == 2
    assert message in error_of(capsys.readouterr().err)


@pytest.mark.thorough
def test_training_and_rollouts(folder, capsys):
    """The real compiler, of a small model: what is trained costs more than adapters; a compressed cache is smaller."""
    shape = ["plan", "--model", folder, "--topology", "v5e:2x2", "--batch", "4", "--json"]
    found = {}
    for what in ("lora:4", "all"):
        assert main([*shape, "--prompt", "64", "--train", what]) == 0
        found[what] = json.loads(capsys.readouterr().out)
    assert found["lora:4"]["fits"]
    assert found["lora:4"]["state_bytes"] < found["all"]["state_bytes"]
    assert found["all"]["frozen_bytes"] < found["lora:4"]["frozen_bytes"]
    options = ["--prompt", "448", "--new", "16", "--compare", "full_cache", "--mesh", "data=4"]
    assert main([*shape, *options, "--rollouts", "2"]) == 0
    compressed, full = json.loads(capsys.readouterr().out)
    assert compressed["fits"]
    assert compressed["program"]["peak_bytes"] > compressed["weight_bytes"]
    assert {plan["weight_bytes"] for plan in (compressed, full)} == {compressed["weight_bytes"]}
