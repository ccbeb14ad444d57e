"""Scores are those of the public packages, on random answers and captions; `expected_metrics.py` wrote them down."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlcache_jax.evaluation.metrics import anls, bleu, cider_d, contained, ptb_tokens, rouge_l, vqa_accuracy
from vlcache_jax.evaluation.sample import Sample
from vlcache_jax.evaluation.tasks import METRICS, TASKS

EXPECTED = json.loads(Path(__file__).with_name("expected_metrics.json").read_text(encoding="utf-8"))


def of_sample(metric, said, answers, **fields):
    return METRICS[metric](said, Sample(id="", answers=tuple(answers), **fields))


SCORES = {
    "anls": lambda said, answers, standard, _: (anls(said, answers), standard),
    "anls of lmms-eval": lambda said, answers, _, flavour: (anls(said, answers, raw_lengths=True), flavour),
    "vqa": lambda said, answers, score: (vqa_accuracy(said, answers), score),
    "relaxed": lambda said, right, score: (of_sample("relaxed_accuracy", said, [right]), score),
    "contained": lambda said, answers, formula, score: (contained(said, answers, formula=formula), score),
    "letters": lambda said, choices, right, score: (of_sample("mmmu", said, [right], choices=tuple(choices)), score),
    "open": lambda said, answers, score: (of_sample("mmmu", said, answers), score),
    "math": lambda said, right, kind, precision, choices, score: (
        of_sample(
            "mathvista_rule", said, [right], choices=tuple(choices), more={"answer_type": kind, "precision": precision}
        ),
        score,
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_answers(name):
    cases = EXPECTED[name.split()[0]]
    assert len(cases) >= 200
    assert len({case[-1] for case in cases}) > 1
    wrong = [(case, found) for case in cases for found, score in [SCORES[name](*case)] if abs(found - score) > 1e-6]
    assert not wrong


def test_prompts():
    for task, question, choices, more, prompt in EXPECTED["prompts"]:
        assert TASKS[task].prompt(Sample(id="", question=question, choices=tuple(choices), more=more)) == prompt


def test_tokens_of_captions():
    captions = EXPECTED["captions"]
    wrong = [(text, own) for text, own in zip(captions["said"], captions["tokens"]) if ptb_tokens(text) != own.split()]
    assert not wrong


def test_captions():
    captions = EXPECTED["captions"]
    said, right = captions["said"], captions["right"]
    assert len(said) >= 200
    scores = cider_d(said, right)
    np.testing.assert_allclose(scores, captions["cider"], atol=1e-6)
    np.testing.assert_allclose(scores.mean(), captions["cider_mean"], atol=1e-6)
    np.testing.assert_allclose([rouge_l(a, b) for a, b in zip(said, right)], captions["rouge_l"], atol=1e-6)
    tens = captions["bleu_4_of_ten"]
    np.testing.assert_allclose([bleu(said[i : i + 10], right[i : i + 10]) for i in range(len(tens))], tens, atol=1e-6)
    assert len(tens) >= 200
