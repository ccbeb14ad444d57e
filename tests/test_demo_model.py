"""The shipped checkpoint: small, complete, and answering as transformers makes it answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.data.tokenizer import build_tokenizer
from vlcache_jax.demo.study.methods import Method
from vlcache_jax.demo.study.run import Study
from vlcache_jax.demo.study.tasks import EXACT, load_task

ASSETS = Path(vlc.__file__).parent / "assets"
NEW = 24


@pytest.fixture(scope="module")
def vlm():
    return vlc.load(ASSETS / "demo_model", dtype="float32")


@pytest.fixture(scope="module")
def questions():
    return json.loads((ASSETS / "demo_images" / "questions.json").read_text(encoding="utf-8"))


def ask(vlm, questions):
    conversations = []
    for entry in questions:
        images = [{"type": "image", "image": str(ASSETS / "demo_images" / name)} for name in entry["images"]]
        conversations.append([{"role": "user", "content": [*images, {"type": "text", "text": entry["question"]}]}])
    return vlm.processor.chat(conversations)


def test_at_most_16_megabytes_and_no_code():
    files = [p for p in (ASSETS / "demo_model").iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 16e6
    assert {p.suffix for p in files} <= {".json", ".jinja", ".safetensors"}


def test_the_vocabulary_is_the_one_the_samples_are_written_in():
    """A checkpoint's token ids mean nothing under another vocabulary: new questions must use its words."""
    shipped = json.loads((ASSETS / "demo_model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped["model"]["vocab"] == build_tokenizer().get_vocab()


def test_every_task_and_several_images_are_shown(vlm, questions):
    assert {"document", "scene", "math", "two pages", "place"} <= {entry["task"] for entry in questions}
    assert max(len(entry["images"]) for entry in questions) == 2
    batch = ask(vlm, questions)
    assert np.asarray(batch.vision_mask).sum(axis=1).min() >= 256
    for entry in questions:
        answer = vlm.processor.tokenizer.encode(entry["answer"], False)
        assert len(answer) >= 3, "answers of fewer tokens hardly feel compression"


def test_transformers_generates_the_same_tokens(vlm, questions):
    batch = ask(vlm, questions)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(ASSETS / "demo_model").eval()
    for row, entry in enumerate(questions):
        n, used = int(batch.lengths[row]), len(entry["images"])
        with torch.no_grad():
            answer = model.generate(
                input_ids=torch.tensor(batch.tokens[row : row + 1, :n]).long(),
                attention_mask=torch.ones(1, n, dtype=torch.long),
                pixel_values=torch.tensor(batch.pixels[row, :used].transpose(0, 3, 1, 2)),
                max_new_tokens=NEW,
                do_sample=False,
            )[0, n:]
        own = np.asarray(out.tokens[row, : out.lengths[row]])
        np.testing.assert_array_equal(own, answer.numpy()[: len(own)])


def test_images_are_what_the_generator_draws(questions):
    for entry in questions:
        for name in entry["images"]:
            path = ASSETS / "demo_images" / name
            assert path.stat().st_size < 100_000
            with Image.open(path) as image:
                assert image.size == (512, 512)


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["documents", "prices", "places"])
def test_what_it_reads_and_what_a_tenth_of_the_cache_keeps(vlm, task):
    """Floors below the measured figures (docs/demo_model.md), by more than the noise of 64 samples."""
    study = Study(vlm)  # the prompts run through the model once; answers are those of `generate` (test_study.py)
    data = load_task(vlm, task, samples=64, batch_size=32)
    prompts = [study.prepare(batch, data.max_new_tokens) for batch in data.batches]

    def right(name, budget):
        answers, _ = study.measure(data, prompts, Method(name), budget)
        return EXACT(vlm.processor.decode(answers), data.answers).mean()

    full, kept, random = right("full_cache", 1.0), right("vl_cache", 0.1), right("random", 0.1)
    assert full >= 0.9
    assert kept >= 0.85 * full
    assert random <= full - 0.2
