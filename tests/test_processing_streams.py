"""Streams of text lose nothing: what they return, joined, is what `decode` gives for all tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
from processing_checkpoint import CORPUS, write_checkpoint

from vlcache_jax.cli.generate import _Printer
from vlcache_jax.models.processor import Processor


@pytest.fixture(scope="module", params=["words", "bytes", "llama"])
def tokenizer(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, tokenizer=request.param)
    return Processor.from_folder(folder).tokenizer


def streamed(tokenizer, ids):
    stream = tokenizer.decode_stream()
    pieces = [stream.push(token) for token in ids]
    return pieces, stream.finish()


@pytest.mark.parametrize("text", [*CORPUS, "naïve café 你好 🙂 — x", "🙂🙂", "é"])
def test_an_answer_cut_anywhere(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    for length in range(len(ids) + 1):
        pieces, rest = streamed(tokenizer, ids[:length])
        assert "".join(pieces) + rest == tokenizer.decode(ids[:length])
        assert "\ufffd" not in "".join(pieces)
    assert not rest


def test_the_end_of_an_answer_gives_what_is_left(tokenizer):
    cut = tokenizer.encode("a 🙂", add_special_tokens=False)[:-1]
    eos = tokenizer.eos_token_id
    pieces, rest = streamed(tokenizer, [*cut, eos, tokenizer.pad_token_id, eos, cut[0]])
    assert "".join(pieces[: len(cut) + 1]) == tokenizer.decode([*cut, eos])
    assert "".join(pieces[len(cut) + 1 :]) + rest == ""  # padding after the end says nothing


def test_the_ends_that_the_models_configuration_names(tmp_path):
    write_checkpoint(tmp_path, tokenizer="bytes")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = Processor.from_folder(tmp_path).tokenizer
    assert {7, 9, tokenizer.eos_token_id} <= tokenizer.end_ids


def test_answers_that_do_not_stop(tokenizer):
    """As `generate(..., eos_token_ids=[])` gives them."""
    ids = [*tokenizer.encode("cat", False), tokenizer.eos_token_id, *tokenizer.encode("image", False)]
    stream = tokenizer.decode_stream(eos_token_ids=[])
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    other = tokenizer.decode_stream(eos_token_ids=[ids[0]])
    assert "".join(map(other.push, ids)) == tokenizer.decode(ids[:1])


def test_a_stream_that_is_finished_stays_so(tokenizer):
    stream = tokenizer.decode_stream()
    assert stream.finish() == ""
    assert stream.push(10) == ""
    assert stream.finish() == ""


def test_the_command_line_prints_what_is_left(tokenizer, capsys):
    cut = tokenizer.encode("a 🙂", add_special_tokens=False)[:-1]
    printer = _Printer(SimpleNamespace(tokenizer=tokenizer))
    for token in cut:
        printer(token)
    assert capsys.readouterr().out + printer.rest() == tokenizer.decode(cut)


def test_special_tokens_on_request(tokenizer):
    ids = [tokenizer.token_to_id("<s>"), *tokenizer.encode("cat", False), tokenizer.eos_token_id]
    stream = tokenizer.decode_stream(skip_special_tokens=False)
    text = "".join(stream.push(token) for token in ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("</s>")


def test_any_tokens_at_all(tokenizer):
    """Models write bytes that are no characters; the stream never fails, and loses no readable text."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(5, tokenizer.vocab_size, 30).tolist()
        pieces, rest = streamed(tokenizer, ids)
        readable = tokenizer.decode(ids).replace("\ufffd", "")
        assert len("".join(pieces) + rest) >= len(readable)
