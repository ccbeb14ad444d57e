"""The demo's data: seeded, labelled as drawn, answerable, and in words the tokenizer knows."""

import re

import numpy as np
import pytest

from vlcache_jax.demo.data import canvas
from vlcache_jax.demo.data.conversations import conversation
from vlcache_jax.demo.data.font import GLYPH_HEIGHT, PITCH, glyph, text_mask
from vlcache_jax.demo.data.labels import WORDS
from vlcache_jax.demo.data.samples import PATCH, TASKS, make_sample
from vlcache_jax.demo.data.tokenizer import UNKNOWN, build_tokenizer, prompt
from vlcache_jax.demo.data.words import COLOURS, FILLERS, ITEMS, NAMES, SHAPES, TITLES
from vlcache_jax.training.batch import pack


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_seed_and_index(task):
    one, again = (make_sample(task, 3, 7, grid=8) for _ in range(2))
    np.testing.assert_array_equal(one.images, again.images)
    assert one.questions == again.questions
    for other in (make_sample(task, 3, 8, grid=8), make_sample(task, 4, 7, grid=8)):
        assert (one.images != other.images).any()
        assert one.questions != other.questions


def test_unknown_task_names_the_tasks():
    with pytest.raises(ValueError, match="documents, document_pairs, prices"):
        make_sample("poems", 0, 0)


@pytest.mark.parametrize("grid", [4, 6, 16])
@pytest.mark.parametrize("task", ["documents", "document_pairs", "prices"])
def test_answers_agree_with_what_the_patches_show(task, grid):
    for index in range(5):
        sample = make_sample(task, 1, index, grid)
        shown = {}
        for owner, digits in zip(sample.labels.owner.reshape(-1), sample.labels.digits.reshape(-1, 4)):
            if owner:
                assert WORDS[owner - 1] not in shown
                shown[WORDS[owner - 1]] = "".join(str(d - 1) for d in digits if d)
        assert sample.questions
        for question, answer in sample.questions:
            named = [word for word in re.findall(r"[a-z]+", question.lower()) if word in shown]
            if task == "prices":
                a, b = named
                assert answer == f"{a} {shown[a]} + {b} {shown[b]} = {int(shown[a]) + int(shown[b])}"
            else:
                assert answer in [f"{word} {shown[word]}" for word in named]
                assert len(answer.split()[1]) == 4


@pytest.mark.parametrize("grid", [4, 10, 16])
def test_places_are_where_the_patches_show_the_values(grid):
    rows, columns = set(), set()
    for index in range(6):
        sample = make_sample("places", 1, index, grid)
        owners = sample.labels.owner[0].tolist()
        for question, answer in sample.questions:
            name, row, column = re.fullmatch(r"(\w+) (\d), (\d)", answer).groups()
            assert name in question
            patch = owners.index(1 + WORDS.index(name))
            assert owners.count(owners[patch]) == 1
            # Four coarse cells of four patches along a side of the full image, counted from 1.
            assert (int(row), int(column)) == (patch // grid // 4 + 1, patch % grid // 4 + 1)
            rows.add(row)
            columns.add(column)
    assert len(rows) == len(columns) == -(-grid // 4)


def test_where_survives_blurring():
    tokenizer = build_tokenizer()
    where = tokenizer.token_to_id("where")
    for index in range(12):
        sample = make_sample("places", 0, index, grid=8)
        blurred = conversation(sample, np.random.default_rng(index))
        assert all(where in question for question, _ in blurred.questions)


@pytest.mark.parametrize("grid", [6, 16])
def test_captions_and_counts_agree_with_the_scene(grid):
    for index in range(8):
        sample = make_sample("scenes", 2, index, grid)
        shapes = [
            (list(COLOURS)[c - 1], SHAPES[s - 1]) for c, s in zip(sample.labels.colour[0], sample.labels.shape[0]) if c
        ]
        assert 3 <= len(shapes) <= 5
        assert sample.questions[0][1] == ", ".join(f"{c} {s}" for c, s in shapes)
        asked, counts = make_sample("counts", 2, index, grid), None
        counts = [int(n) for n in asked.questions[0][1].split(", ")]
        drawn = [SHAPES[s - 1] for s in asked.labels.shape[0] if s]
        named = re.findall("|".join(SHAPES), asked.questions[0][0])
        assert counts == [drawn.count(shape) for shape in named]


def test_values_have_ink_where_the_labels_say():
    sample = make_sample("documents", 5, 0)
    image = sample.images[0].astype(float).mean(-1)
    patches = image.reshape(16, PATCH, 16, PATCH).swapaxes(1, 2).reshape(256, PATCH, PATCH)
    dark = (patches < 120).sum(axis=(1, 2))
    assert dark[sample.labels.owner[0] > 0].min() > 40
    assert dark[sample.labels.word[0] % 2 == 1].min() > 40  # first halves; second ones may hold half a letter


def test_full_pages_hold_many_fields_and_share_prefixes():
    counts, shared = [], 0
    for index in range(20):
        sample = make_sample("documents", 6, index)
        counts.append(int((sample.labels.owner > 0).sum()))
        values = {answer.split()[1] for _, answer in sample.questions}
        shared += len({value[:2] for value in values}) < len(values)
    assert min(counts) >= 8
    assert max(counts) > 30
    assert shared >= 15


def test_names_are_distinct_across_two_pages():
    sample = make_sample("document_pairs", 1, 1)
    first, second = (set(owner[owner > 0]) for owner in sample.labels.owner)
    assert first
    assert second
    assert not first & second


def test_everything_printed_has_a_glyph():
    for text in (*FILLERS, *TITLES, *(name.upper() for name in (*NAMES, *ITEMS)), "0123456789"):
        assert text_mask(text).shape == (GLYPH_HEIGHT, PITCH * len(text))
    assert all(len(name) <= 8 for name in WORDS)
    drawn = [glyph(c).tobytes() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
    assert len(set(drawn)) == len(drawn)


def test_blending_is_cut_at_the_borders():
    image = np.full((16, 16, 3), 200, np.uint8)
    for y, x in ((-4, -4), (12, 12), (40, 3), (3, -40)):
        canvas.blend(image, np.ones((8, 8), np.float32), y, x, (0, 0, 0))
    expected = np.full((16, 16, 3), 200, np.uint8)
    expected[:4, :4] = expected[12:, 12:] = 0
    np.testing.assert_array_equal(image, expected)


def test_shapes_differ():
    masks = [canvas.shape_mask(shape, 12) for shape in SHAPES]
    for i, a in enumerate(masks):
        assert 0.2 < a.mean() < 0.85
        assert all(abs(a - b).mean() > 0.05 for b in masks[:i])


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_answers_are_words_the_tokenizer_knows(task):
    tokenizer = build_tokenizer()
    unknown = tokenizer.token_to_id(UNKNOWN)
    for index in range(10):
        sample = make_sample(task, 9, index, grid=6)
        for question, answer in sample.questions:
            assert unknown not in tokenizer.encode(prompt(question, len(sample.images))).ids
            ids = tokenizer.encode(answer, add_special_tokens=False).ids
            assert len(ids) >= 3  # shorter answers hardly feel compression
            assert tokenizer.decode(ids) == answer


def test_packed_rows_are_the_prompts_of_the_tokenizer():
    tokenizer = build_tokenizer()
    sample = make_sample("document_pairs", 0, 0, grid=4)
    batch = pack([conversation(sample)], 160)
    question, answer = sample.questions[0]
    text = prompt(question, 2).replace("<image> <image>", "<image>" * 32) + f" {answer}</s>"
    row = batch.batch.tokens[0][batch.segments[0] <= 1][: len(tokenizer.encode(text).ids)]
    assert row.tolist() == tokenizer.encode(text).ids
    assert batch.batch.vision_index[0].max() == 31


def test_blurring_keeps_what_a_question_is_about():
    tokenizer = build_tokenizer()
    sample = make_sample("documents", 0, 3, grid=8)
    clear, blurred = conversation(sample), conversation(sample, np.random.default_rng(0))
    changed = 0
    for (a, answer), (b, same), (question, _) in zip(clear.questions, blurred.questions, sample.questions):
        name = next(word for word in re.findall(r"[a-z]+", question.lower()) if word in NAMES)
        assert tokenizer.token_to_id(name) in b
        assert answer == same
        changed += a != b
    assert changed
