"""The text tasks of benchmarks/pretrained, and the decoder they are for, which a package carries."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

import vlcache_jax as vlc

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "pretrained"))
import make_checkpoint
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


def test_right_answers_end_where_the_right_answer_ends():
    sample = tasks.Sample("", "", "4785")
    assert [sample.right(said) for said in (" 4785.", "4785", "47851", "478", "x 4785")] == [True, True, *[False] * 3]


def test_longer_prose_keeps_the_question():
    short, long = (tasks.codes(random.Random(0), sentences) for sentences in (16, 160))
    assert len(long.text) > 8 * len(short.text)
    assert "code" in long.text.rpartition("\n\n")[2]


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
