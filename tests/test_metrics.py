"""Scores of answers against values worked out by hand and formulas written another way."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_jax.evaluation.metrics import (
    anls,
    bootstrap_interval,
    cider_d,
    contained,
    edit_distance,
    exact_match,
    math_answer,
    option_letter,
    ptb_tokens,
    relaxed_accuracy,
    vqa_accuracy,
)


def distance_by_recursion(a, b):
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance_by_recursion(a[1:], b[1:])
    return 1 + min(
        distance_by_recursion(a[1:], b), distance_by_recursion(a, b[1:]), distance_by_recursion(a[1:], b[1:])
    )


@given(st.text("ab ", max_size=5), st.text("ab ", max_size=5))
def test_edit_distance_is_its_recursion(a, b):
    assert edit_distance(a, b) == distance_by_recursion(a, b)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("water 3349", ["water 3349"], 1.0),
        ("Water  3349 ", ["water 3349"], 1.0),
        ("1324", ["1,324"], 0.8),  # 1 of 5 characters
        ("1,324", ["9", "1324"], 0.8),
        ("12", ["1234"], 0.5),  # at the threshold
        ("12", ["12345"], 0.0),  # below it
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("kitten", "sitting", 4 / 7),
    ],
)
def test_anls_by_hand(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)


def test_anls_threshold():
    assert anls("12", "12345", threshold=0.3) == pytest.approx(0.4)


def test_exact_match_ignores_case_and_space_only():
    assert exact_match(" Red  circle", "red circle") == 1.0
    assert exact_match("red circle.", "red circle") == 0.0


@pytest.mark.parametrize(
    ("prediction", "right", "expected"),
    [("dog", 0, 0.0), ("dog", 1, 0.3), ("The dog!", 2, 0.6), ("a dog", 3, 0.9), ("dog", 4, 1.0), ("dog", 10, 1.0)],
)
def test_vqa_accuracy_leaves_one_out(prediction, right, expected):
    """With m of 10 right: m times min(1, (m - 1) / 3) and 10 - m times min(1, m / 3)."""
    assert vqa_accuracy(prediction, ["dog"] * right + ["cat"] * (10 - right)) == pytest.approx(expected)


def test_vqa_accuracy_normalises():
    assert vqa_accuracy("Two, please.", ["2 please"]) == 1.0
    assert vqa_accuracy("1,000", ["1000"]) == 1.0
    assert vqa_accuracy("3.5", ["35"]) == 0.0
    assert vqa_accuracy("don't", ["dont"]) == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, riding a horse.", "a man riding a horse"),
        ("He doesn't; they'll, I'm, dogs' and John's", "he does n't they 'll i 'm dogs and john 's"),
        ("I cannot and wanna go", "i can not and wan na go"),
        ("a well-known 3-star hotel -- really...", "a well-known 3-star hotel really"),
        ("1,234.5 at 10:30, 5% of $3.50", "1,234.5 at 10:30 5 % of $ 3.50"),
        ('the "U.S. Army" (and) [others]', "the u.s. army -lrb- and -rrb- -lsb- others -rsb-"),
        ("", ""),
    ],
)
def test_ptb_tokens(text, tokens):
    assert " ".join(ptb_tokens(text)) == tokens


def cider_from_the_formula(predictions, references, sigma=6.0):
    """Written with dense vectors over the n-grams of everything, unlike the library's."""
    scores = np.zeros(len(predictions))
    for n in range(1, 5):

        def grams(text, n=n):
            words = ptb_tokens(text)
            return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

        vocabulary = sorted({g for t in [*predictions, *(r for rs in references for r in rs)] for g in grams(t)})
        holding = np.array([sum(any(g in grams(r) for r in rs) for rs in references) for g in vocabulary])
        idf = np.log(len(references) / np.maximum(holding, 1))
        for i, (prediction, refs) in enumerate(zip(predictions, references)):
            c = np.array([grams(prediction)[g] for g in vocabulary]) * idf
            for ref in refs:
                r = np.array([grams(ref)[g] for g in vocabulary]) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                cosine = np.minimum(c, r) @ r / norm if norm else 0.0
                gap = len(ptb_tokens(prediction)) - len(ptb_tokens(ref))
                scores[i] += 10 / 4 / len(refs) * cosine * math.exp(-(gap**2) / (2 * sigma**2))
    return scores


CAPTION = st.lists(st.sampled_from(["red", "blue", "circle,", "star", "star."]), min_size=1, max_size=8).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_cider_is_its_formula(images):
    predictions, references = zip(*images)
    np.testing.assert_allclose(
        cider_d(predictions, references), cider_from_the_formula(predictions, references), atol=1e-9
    )


def test_cider_by_hand():
    """Two images that share no word: every n-gram has idf log 2, and a perfect caption of four words scores 10."""
    references = [["red circle blue star"], ["green ring grey box"]]
    np.testing.assert_allclose(cider_d([r[0] for r in references], references), [10, 10])
    # One word more than the reference, and one of its 5, 4, 3, 2 n-grams is wrong.
    longer = math.exp(-1 / 72) * 10 / 4 * sum(k / math.sqrt(k * (k + 1)) for k in (4, 3, 2, 1))
    assert cider_d(["red circle blue star box", "green"], references)[0] == pytest.approx(longer)
    assert cider_d(["", "green ring grey box"], references).tolist() == pytest.approx([0, 10])
    # Saying a word twice does not count twice.
    assert cider_d(["red red red red", ""], references)[0] < 10 / 4 * 0.5


def test_cider_needs_references():
    with pytest.raises(ValueError, match="none of them empty"):
        cider_d(["a"], [[]])


def test_interval_covers_the_mean_and_narrows():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        few = rng.normal(1.0, 1.0, 80)
        mean, low, high = bootstrap_interval(few, seed=seed, draws=400)
        assert low < mean < high
        assert mean == pytest.approx(few.mean())
        inside += low <= 1.0 <= high
    assert 33 <= inside <= 40  # 38 expected
    normal = 1.96 / math.sqrt(400)
    _, low, high = bootstrap_interval(rng.normal(0, 1, 400))
    assert high - low == pytest.approx(2 * normal, rel=0.15)


def test_paired_interval_is_narrower():
    rng = np.random.default_rng(1)
    full = (rng.random(300) < 0.6).astype(float)
    other = np.where(rng.random(300) < 0.02, 1 - full, full)
    paired = bootstrap_interval(other - full)
    alone = bootstrap_interval(other)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(np.array(values))


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("10.5", "10", 1), ("10.51", "10", 0), ("-95", "-100", 1), ("5%", "0.05", 1), ("0", "0", 1), ("0.01", "0", 0),
        ("Blue ", "blue", 1), ("blue", "red", 0), ("12", "twelve", 0), ("1,000", "1000", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, answer, expected):
    assert relaxed_accuracy(prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B. a dog", 1), ("B: a dog", 1), ("The answer is B.", 1), ("Answer: (B)", 1),
        ("It is a dog", 1), ("a dog", 1), ("A", 0), ("A dog barks", 1), ("The answer is A", 0), ("none of them", 0),
        ("", 0), ("a cat or a dog", 0), ("I choose C", 0),
    ],
)  # fmt: skip
def test_option_letter(prediction, expected):
    assert option_letter(prediction, ["B"], ["a cat", "a dog", "a bird"]) == expected
    assert option_letter(prediction, ["a dog"], ["a cat", "a dog", "a bird"]) == expected


def test_contained():
    assert contained("Total:  12.50 EUR", ["12.50"]) == 1
    assert contained("total", ["12.50", "TOTAL"]) == 1
    assert contained("12.5", ["12.50"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "kind", "precision", "expected"),
    [
        ("14", "14", "integer", None, 1), ("The answer is 14.", "14", "integer", None, 1),
        ("2 + 12 = 14 apples", "14", "integer", None, 1), ("14 or 15", "14", "integer", None, 0),
        ("1,200", "1200", "integer", None, 1), ("none", "14", "integer", None, 0), ("inf", "14", "integer", None, 0),
        ("about 0.649 m", "0.6", "float", 1, 1), ("0.66", "0.6", "float", 1, 0), ("1.449", "1.45", "float", 2, 1),
        ("Between [2007, 2008].", "[2007, 2008]", "list", None, 1), ("2007, 2008", "[2007, 2008]", "list", None, 0),
        ("[2008, 2007]", "[2007, 2008]", "list", None, 0), ("Yes", "yes", "text", None, 1),
    ],
)  # fmt: skip
def test_math_answer(prediction, answer, kind, precision, expected):
    assert math_answer(prediction, answer, kind, precision) == expected
