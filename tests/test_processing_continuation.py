"""Text that goes on where a prompt ends, and texts of answers to several questions."""

from pathlib import Path

import numpy as np
import pytest

import vlcache_jax as vlc
from vlcache_jax.models.processor import Processor

DEMO = Path(vlc.__file__).parent / "assets" / "demo_model"


@pytest.fixture(scope="module")
def processor():
    return Processor.from_folder(DEMO)


def test_ids_are_those_of_the_whole_text_without_its_start(processor):
    whole = processor(text="USER: what is the total? ASSISTANT:")
    first = processor(text="USER:")
    asked = processor.continuation("what is the total? ASSISTANT:")
    n, start = int(whole.lengths[0]), int(first.lengths[0])
    assert asked.tokens.shape == (1, 16)
    assert int(asked.lengths[0]) == n - start
    np.testing.assert_array_equal(asked.tokens[0, : n - start], whole.tokens[0, start:n])
    assert (asked.tokens[0, n - start :] == processor.tokenizer.pad_token_id).all()


def test_several_texts_for_each_row(processor):
    texts = [["what is the total?", "who?"], ["where", "can you read the tax?"]]
    asked = processor.continuation(texts)
    assert asked.tokens.shape == (2, 2, 16)
    for row, column in np.ndindex(2, 2):
        alone = processor.continuation([texts[row][column]])
        np.testing.assert_array_equal(asked.tokens[row, column], alone.tokens[0])
        assert asked.lengths[row, column] == alone.lengths[0]
    assert processor.decode(asked) == [
        [processor.tokenizer.decode(asked.tokens[i, j, : asked.lengths[i, j]]) for j in range(2)] for i in range(2)
    ]
    assert processor.decode(asked)[1][1] == "can you read the tax?"


@pytest.mark.parametrize(("words", "length"), [(16, 16), (17, 32), (33, 64), (65, 128)])
def test_padding(processor, words, length):
    assert processor.continuation(["the " * words]).tokens.shape == (1, length)
    assert processor.continuation(["the " * words], pad_to=200).tokens.shape == (1, 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "give a text for each row"),
        ([[]], "give a text for each row"),
        ([["a"], "b"], "give a text for each row"),
        (3, "text is '3'"),
        ([["a", "b"], ["c"]], r"the rows have \[2, 1\] texts"),
        ([["a", "see <image>"]], "text 1 holds '<image>'"),
        (["a", ""], "text 1 is empty"),
    ],
)
def test_bad_texts(processor, text, message):
    with pytest.raises(vlc.InputError, match=message):
        processor.continuation(text)


def test_too_little_room(processor):
    with pytest.raises(vlc.InputError, match="pad_to=2 does not hold 3 tokens in the longest text"):
        processor.continuation("what is total", pad_to=2)
