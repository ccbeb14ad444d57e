"""The text tasks of benchmarks/pretrained, and the decoder they are for, which a package carries."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, demo_assets
from vlcache_jax.demo.data.labels import WORDS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "pretrained"))
import attention
import make_checkpoint
import strips
import study
import tasks


@pytest.mark.parametrize("task", tasks.TASKS)
def test_what_is_asked_can_be_read_and_is_drawn_anew(task):
    samples = [tasks.make_sample(task, 0, index, 16) for index in range(50)]
    assert samples == [tasks.make_sample(task, 0, index, 16) for index in range(50)]
    assert len({sample.text for sample in samples}) == 50
    assert not {s.text for s in samples} & {tasks.make_sample(task, 1, i, 16).text for i in range(50)}
    for sample in samples:
        prose, _, question = sample.text.rpartition("\n\n")
        assert sample.answer in prose
        assert sample.answer not in question
        assert f"{sample.begun} {sample.answer}" in prose or task in ("opening", "instruction")
        assert prose.count(sample.answer) == 1
        assert sample.prompt.endswith(sample.begun)
        before, later = sample.split
        assert before + later == sample.prompt
        assert sample.answer in before
        assert later.startswith(question)


def test_right_answers_end_where_the_right_answer_ends():
    sample = tasks.Sample("", "", "4785")
    assert [sample.right(said) for said in (" 4785.", "4785", "47851", "478", "x 4785")] == [True, True, *[False] * 3]


def test_longer_prose_keeps_the_question():
    short, long = (tasks.codes(random.Random(0), sentences) for sentences in (16, 160))
    assert len(long.text) > 8 * len(short.text)
    assert "code" in long.text.rpartition("\n\n")[2]


def test_what_the_rows_after_the_image_give_and_how_many_tokens_hold_it():
    draw = np.random.default_rng(0)
    query, key = draw.normal(size=(1, 1, 6, 2, 4)), draw.normal(size=(1, 1, 6, 1, 4))
    recorded = attention.Recording(*(np.float32(x) for x in (query, key, key)), None, None)
    mass = np.asarray(attention.received(recorded, np.array([5]), np.arange(6)[None] == 2))
    for head in range(2):
        weights = np.exp(query[0, 0, 3:5, head] @ key[0, 0, :, 0].T / 2) * np.tri(2, 6, 3)
        np.testing.assert_allclose(
            mass[0, 0, head], np.mean(weights / weights.sum(1, keepdims=True), axis=0), atol=1e-6
        )
    found = np.array([[[0.0, 0.5, 0.45, 0.05, 0.0]]])
    assert attention.needed(found, np.array([4])) == 2 / 4
    scores = np.array([[[[9.0, 3.0, 1.0, 2.0, 0.0]]]])
    np.testing.assert_allclose(attention.held(scores, found[None], np.array([5]), 0.4), 0.55)  # of tokens 1 and 3


def test_a_study_pads_all_tasks_to_one_length():
    tokenizer = SimpleNamespace(encode=lambda text, special: text.split())
    vlm = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    drawn, length = study.draw(vlm, ["codes", "opening"], 3, None, seed=1)
    assert {task: len(samples) for task, samples in drawn.items()} == {"codes": 3, "opening": 3}
    assert drawn["codes"][2] == tasks.make_sample("codes", 1, 2, study.LENGTHS["codes"])
    longest = max(len(sample.prompt.split()) for samples in drawn.values() for sample in samples)
    assert length - 64 < longest <= length
    assert length % 64 == 0


def test_a_study_asks_when_the_prompts_have_been_compressed():
    """As `vlc.extend` does after `vlc.compress`, with the full cache and a policy; bytes are of the prompts alone."""
    vlm = vlc.load(demo_assets(None) / MODEL, dtype="float32", layout="stacked")
    parts = [("USER: Read the value of salary\n", "on this page."), ("USER: Where do you see it\n", "in the image?")]
    samples = [SimpleNamespace(prompt="".join(pair), split=pair, right=lambda said: bool(said)) for pair in parts]
    prompts = study.prepare(vlm, samples, 32, 2, before=True)
    batch = vlm.processor(images=[[]] * 2, text=[first for first, _ in parts], pad_to=32)
    question = vlm.processor.continuation([second for _, second in parts], pad_to=32)

    def answered(policy):
        context = vlc.extend(vlc.compress(vlm.model, vlm.params, batch, policy), question)
        return np.asarray(vlc.answer(context, None, max_new_tokens=tasks.MAX_NEW_TOKENS).tokens)

    np.testing.assert_array_equal(prompts.answers.tokens, answered(vlc.FullCache()))
    found = study.measure(vlm, prompts, vlc.SnapKV(0.5, window=2))
    same = np.all(answered(vlc.SnapKV(0.5, window=2)) == np.asarray(prompts.answers.tokens), axis=1)
    assert found["agrees"] == "".join(str(int(x)) for x in same)
    assert 0.4 < found["bytes"] <= 0.6


def test_a_study_goes_on_and_compares_the_same_samples(tmp_path):
    measured = {"right": "10", "agrees": "11", "kl": [0.0, 0.0], "log_likelihood": [-1.0, -2.0], "bytes": 1.0}
    lines = study.Lines(tmp_path / "lines.jsonl", seed=1, rows=2)
    for first in (0, 2):
        lines.add("codes", "full_cache", first, measured)
    lines.add("codes", "snap_kv:0.4", 0, measured | {"right": "00", "kl": [1.0, 3.0], "bytes": 0.4})
    again = study.Lines(tmp_path / "lines.jsonl", seed=1, rows=2)
    assert again.has("codes", "full_cache", 2)
    assert not again.has("codes", "snap_kv:0.4", 2)
    assert again.values("codes", "full_cache")["right"].tolist() == [1, 0, 1, 0]
    assert (
        "| snap_kv:0.4 | 2 | 40.0 | 0 | 0 (-100 to +0) | 100 (+0 to +0) | 2.0000 (+1.0000 to +3.0000) |"
        in again.table()
    )
    assert not study.Lines(tmp_path / "lines.jsonl", seed=0, rows=2).found


class Words:
    """A tokenizer of words and digits that can tell what it encoded."""

    def encode(self, text, special):
        return [ord(c) for c in text] if text.isdigit() or text == " " else [1000 + WORDS.index(text[1:])]


@pytest.mark.parametrize("task", strips.TASKS)
def test_strips_show_what_is_asked_and_are_those_of_their_seed(task):
    drawn = [strip for index in range(4) for strip in strips.strips(task, 0, index)]
    again = strips.strips(task, 0, 0)
    assert again[0].questions == drawn[0].questions
    np.testing.assert_array_equal(again[0].image, drawn[0].image)
    assert drawn[0].questions != strips.strips(task, 1, 0)[0].questions
    for strip in drawn:
        assert strip.image.shape == (strips.IMAGE_SIZE, strips.IMAGE_SIZE, 3)
        ids = strips.shown(strip, Words())
        text = "".join(f" {WORDS[i - 1000]}" if i >= 1000 else chr(i) for i in ids.tolist())
        assert len(ids) == 256
        assert len(strip.fields) == len(strip.questions) > 1
        for question, answer in strip.questions:
            fields = answer.partition(" =")[0].split(" + ")
            assert all(field.split()[0] in question for field in fields)
            assert all(f" {field} " in f"{text} " for field in fields), (answer, text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    make_checkpoint.make_checkpoint(folder)
    return folder


@pytest.mark.thorough
def test_a_pretrained_decoder_answers_as_in_transformers(folder):
    import torch
    import transformers

    vlm = vlc.load(folder, dtype="float32")
    prompts = [tasks.make_sample(task, 0, 0, 8).prompt for task in ("codes", "list", "opening")]
    batch = vlm.processor(images=[[]] * 3, text=prompts)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), max_new_tokens=16)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        ids = vlm.processor.tokenizer.encode(prompt, False)
        with torch.no_grad():
            said = reference.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        count = int(out.lengths[row])
        assert np.asarray(out.tokens[row, :count]).tolist() == said[:count].tolist()
    texts = vlm.processor.decode(vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(bits=8), max_new_tokens=16))
    assert [text[:6] for text in texts] == [text[:6] for text in vlm.processor.decode(out)]
