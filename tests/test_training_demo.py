"""The demo's recipe at a size that runs in seconds: stages, resuming, export, and what transformers makes of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlcache_jax as vlc
from vlcache_jax.demo.data.export import EXAMPLES
from vlcache_jax.demo.data.samples import make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.demo.recipe.recipe import FULL, Shape, Stage
from vlcache_jax.demo.recipe.train import demo_batch, train_demo
from vlcache_jax.terminal.progress import Progress

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
DECODER = {**VISION, "num_layers": 2, "num_kv_heads": 1, "head_dim": 16}
SMOKE = dataclasses.replace(
    FULL,
    config=dataclasses.replace(
        FULL.config,
        vision=dataclasses.replace(FULL.config.vision, **VISION),
        decoder=dataclasses.replace(FULL.config.decoder, **DECODER),
        feature_layers=(1,),
    ),
    stages=(
        Stage((Shape(FULL.stages[1].shapes[0].tasks, 4, 1, 6, 96),), 2.0, 0.5),
        Stage((Shape(("document_pairs",), 4, 2, 4, 128),), 2.0, 1.0),
    ),
    vision_steps=4,
    vision_grid=4,
    vision_rows=8,
    warmup=2,
)
"""A size that runs in seconds and learns nothing."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    train_demo(folder, steps=2, recipe=SMOKE, progress=Progress(enabled=False))
    params = train_demo(folder, steps=4, recipe=SMOKE, progress=Progress(enabled=False))
    return folder, params


@pytest.fixture(scope="module")
def vlm(run):
    return vlc.load(run[0] / "demo_model", dtype="float32")


@pytest.mark.thorough
def test_a_second_call_resumes(run):
    entries = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert sum(entry.get("stage") == "vision" for entry in entries) == 1  # the tower was not trained again
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run[1]))


def test_data_is_a_function_of_the_number():
    shape = SMOKE.stages[0].shapes[0]
    one, same, other = (demo_batch(SMOKE, shape, 0, n) for n in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.train.batch.tokens != other.train.batch.tokens).any()


@pytest.mark.thorough
def test_export_holds_what_was_trained(run, vlm):
    jax.tree.map(np.testing.assert_array_equal, vlm.with_layout("stacked").params, jax.device_get(run[1]))
    assert vlm.config == SMOKE.config


@pytest.mark.thorough
def test_transformers_generates_the_same_tokens(run, vlm):
    folder = run[0] / "demo_model"
    processor = LlavaProcessor.from_pretrained(folder)
    reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    sample = make_sample("document_pairs", 0, 0)
    images = [Image.fromarray(image) for image in sample.images]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": sample.questions[0][0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt(sample.questions[0][0], len(images))

    inputs = processor(images=images, text=text, return_tensors="pt")
    batch = vlm.processor(images=[images], text=[text])
    length = int(batch.lengths[0])
    assert inputs["input_ids"][0].tolist() == batch.tokens[0, :length].tolist()
    theirs = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:].tolist()
    ours = vlc.generate(vlm.model, vlm.params, batch, max_new_tokens=12)
    assert np.asarray(ours.tokens)[0, : int(ours.lengths[0])].tolist() == theirs
    assert processor.decode(theirs, skip_special_tokens=True) == vlm.processor.decode(ours)[0]


@pytest.mark.thorough
def test_examples_are_small_and_answerable(run):
    folder = run[0] / "demo_images"
    entries = json.loads((folder / "questions.json").read_text())
    assert len(entries) == len(EXAMPLES)
    for entry in entries:
        assert entry["question"]
        assert len(entry["answer"].split()) >= 2
        for name in entry["images"]:
            assert (folder / name).stat().st_size < 100_000
            with Image.open(folder / name) as image:
                assert image.size == (512, 512)
    assert max(len(entry["images"]) for entry in entries) == 2
