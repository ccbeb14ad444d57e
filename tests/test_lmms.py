"""The model for lmms-eval: beside a small fake of its interface; and, in the thorough tier, in lmms-eval itself."""

import dataclasses
import importlib
import json
import os
import re
import site
import subprocess
import sys
import types
import venv
from pathlib import Path

import numpy as np
import pytest
from lmms_task import write_tasks
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.evaluation.lmms.manifest import manifest
from vlcache_jax.evaluation.lmms.prompts import of_chat, of_simple, request

ROOT = Path(__file__).parent.parent
IMPORTED = ["accelerate", "datasets", "evaluate", "jsonlines", "loguru", "pytablewriter", "sacrebleu", "tenacity"]
"""What lmms-eval imports for the tasks of `lmms_task`, torch and transformers aside."""
POLICY = "vl_cache:0.5"


@dataclasses.dataclass
class Instance:
    args: tuple


@dataclasses.dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


class FakeLmms:
    """Of lmms-eval's base class what the evaluator and models use."""

    is_simple = True

    def __init__(self):
        self.task_dict, self.rank, self.hooked = {}, 0, []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *call: self.hooked.append(call))


@pytest.fixture(scope="module")
def classes():
    """The two classes, made upon the fake; and what was logged of their speed."""
    counts = dataclasses.make_dataclass("TokenCounts", ["input_tokens", "output_tokens"])
    generated = dataclasses.make_dataclass("GenerationResult", ["text", "token_counts"])
    logged = []
    fakes = {
        "lmms_eval.api.instance": {"GenerationResult": generated, "TokenCounts": counts},
        "lmms_eval.api.model": {"lmms": FakeLmms},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **found: logged.append(found)},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    names = {name.rsplit(".", n)[0] for name in fakes for n in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        for name in sorted(names):
            module = types.ModuleType(name)
            vars(module).update(fakes.get(name, {}), __path__=[])
            patch.setitem(sys.modules, name, module)
        found = manifest()
        assert found.model_id == "vlcache_jax"
        paths = (found.simple_class_path, found.chat_class_path)
        yield (
            *(getattr(importlib.import_module(path.rsplit(".", 1)[0]), path.rsplit(".", 1)[1]) for path in paths),
            logged,
        )
        sys.modules.pop("vlcache_jax.evaluation.lmms.model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_llava(folder)
    return folder


DOCS = [
    {"image": np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8), "question": f"w{i} w2"}
    for i in range(5)
]
OPTIONS = {"max_new_tokens": 7, "temperature": 0, "do_sample": False, "until": ["\n\n"], "num_beams": 1}


def images(doc):
    return [Image.fromarray(doc["image"])]


def messages(doc):
    parts = [{"type": "image", "url": images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]


def asked(chat, number, options=OPTIONS):
    question = DOCS[number]["question"]
    first = (question, messages, options) if chat else (question, options, images)
    return Instance((*first, number, "task", "test"))


def model(kind, checkpoint, **options):
    found = kind(str(checkpoint), policy=POLICY, **options)
    found.task_dict = {"task": {"test": DOCS}}
    return found


def check_answers(classes, checkpoint, batch_sizes):
    simple, chat, logged = classes
    vlm = vlc.load(checkpoint, dtype="float32")
    batch = vlm.processor.chat([of_chat(messages(doc)) for doc in DOCS])
    expected = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.5), 7)
    texts = vlm.processor.decode(expected)
    for size in batch_sizes:
        for kind in (simple, chat):
            own = model(kind, checkpoint, batch_size=size, device="cpu")
            found = own.generate_until([asked(kind is chat, i) for i in (3, 1, 4, 0, 2)])
            assert [one.text for one in found] == [texts[i] for i in (3, 1, 4, 0, 2)]
            assert found[0].token_counts.output_tokens == int(expected.lengths[3])
            assert found[0].token_counts.input_tokens == int(batch.lengths[3])
            assert own.hooked[0] == ("generate_until", (DOCS[3]["question"], OPTIONS), texts[3])
    assert logged[-1]["total_gen_tokens"] == int(np.sum(expected.lengths))
    check_losses(own, vlm, batch, expected, texts)


def check_losses(own, vlm, batch, expected, texts):
    """Of one, three and one answers: the loss is the mean of what `score` finds."""

    def first(doc):
        assert doc is DOCS[0]
        return texts[0]

    answers = [(0, first), (1, "w4 w5 w6"), (1, "w1"), (1, "w7 w7"), (2, texts[2])]
    found = own.loglikelihood([Instance((DOCS[i]["question"], text, images, i, "task", "test")) for i, text in answers])
    assert [greedy for _, greedy in found[::4]] == [True, True]
    ctx = vlc.compress(vlm.model, vlm.params, batch, vlc.VLCache(0.5))
    three = vlm.processor.continuation([[text for _, text in answers[1:4]]] * len(DOCS))
    scores = vlc.score(ctx, three)
    np.testing.assert_allclose([loss for loss, _ in found[1:4]], -scores.mean[1], rtol=1e-4)
    assert [greedy for _, greedy in found[1:4]] == np.asarray(scores.greedy)[1].all(axis=-1).tolist()
    assert own.hooked[-1][0] == "loglikelihood"


def test_answers_and_losses_are_those_of_the_library(classes, checkpoint):
    check_answers(classes, checkpoint, [3])


@pytest.mark.thorough
def test_batch_sizes_change_nothing(classes, checkpoint):
    check_answers(classes, checkpoint, [1, 2, 8])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "sampling": None, "stop": []}),
        (
            {"temperature": 0.7, "top_p": 0.9, "seed": 4},
            {"sampling": vlc.Sampling(temperature=0.7, top_p=0.9), "seed": 6},
        ),
        ({"do_sample": True}, {"sampling": vlc.Sampling()}),
        ({"do_sample": False, "temperature": 0.7}, {"sampling": None}),
        ({"until": ["\n\n", "###", ""], "stop_sequences": "Q:"}, {"stop": ["###", "Q:"]}),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"length_penalty": 2}, "length_penalty=2, which is not known"),
    ],
)
def test_what_a_task_asks(options, expected):
    processor = types.SimpleNamespace(has_chat_template=True)
    if isinstance(expected, str):
        with pytest.raises(vlc.InputError, match=expected):
            request(processor, of_simple("text", None), options)
        return
    found = request(processor, of_simple("text", None), options, number=2)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.prompt == [{"role": "user", "content": [{"type": "text", "text": "text"}]}]


def test_without_a_chat_template_images_come_first():
    processor = types.SimpleNamespace(has_chat_template=False, image_token="<image>")
    found = request(processor, of_simple("text", ["a", "b"]), {})
    assert (found.prompt, found.images) == ("<image>\n<image>\ntext", ["a", "b"])


def test_what_cannot_be_asked(classes, tmp_path):
    simple, chat, _ = classes
    assert (simple.is_simple, chat.is_simple) == (True, False)
    with pytest.raises(vlc.InputError, match="model_args has budget"):
        simple(str(tmp_path), budget=0.1)
    with pytest.raises(vlc.InputError, match="mesh='2' is not of the form 4x2"):
        simple(str(tmp_path), mesh="2")
    with pytest.raises(vlc.InputError, match="'audio' is not supported"):
        of_chat([{"role": "user", "content": [{"type": "audio", "url": "x"}]}])
    with pytest.raises(NotImplementedError, match="of one round"):
        simple.generate_until_multi_round(None, [])


@pytest.mark.thorough
def test_in_lmms_eval_itself(tmp_path):
    """An environment beside this one, with what lmms-eval needs; the logs are the same for every batch size.

    Not all that it asks for: that is some fifty packages and ten minutes, most of which no task of ours imports.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    (packages / "this.pth").write_text(
        "\n".join(f"import site; site.addsitedir({path!r})" for path in site.getsitepackages())
    )
    extra = re.search(r"^lmms = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--ignore-installed", *json.loads(extra[1])], check=True)
    subprocess.run([*pip, *IMPORTED], check=True)
    subprocess.run([*pip, "--no-deps", "--target", packages, ROOT], check=True)
    (tmp_path / "task").mkdir()
    write_tasks(tmp_path / "task", 20)
    known = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"}
    for size in (1, 3):
        options = {
            "model": "vlcache_jax",
            "model_args": f"pretrained={ROOT / 'vlcache_jax/assets/demo_model'},policy=vl_cache:0.1,rows={size}",
            "tasks": "demo_pages,demo_choices",
            "include_path": tmp_path / "task",
            "output_path": tmp_path / f"out{size}",
            "batch_size": size,
            "force_simple": "",  # multiple choice is for simple models only
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
        subprocess.run([python, "-m", "lmms_eval", *arguments, "--log_samples"], check=True, env=known, cwd=tmp_path)
    first, second = (logs(tmp_path / f"out{size}") for size in (1, 3))
    assert len(first) == 40
    assert first == second
    (results,) = (tmp_path / "out1").rglob("*results.json")
    found = json.loads(results.read_text())["results"]
    assert found["demo_pages"]["exact_match,none"] >= 0.9
    assert found["demo_choices"]["acc,none"] >= 0.9


def logs(folder):
    paths = sorted(folder.rglob("*samples*.jsonl"), key=lambda path: path.name.partition("samples")[2])
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
