"""A processor and a loaded model can be pickled, copied and sent to other processes."""

import copy
import multiprocessing
import pickle

import jax
import numpy as np
import pytest
from processing_checkpoint import edit_json, picture, write_checkpoint
from tiers import later
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.models.processor import Processor

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is </s> it?"}]}]


def ask(processor):
    return processor.chat(QUESTION, images=picture(30, 20))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module", params=["llava_next", *later("llava")])
def processor(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, request.param, tokenizer="bytes")
    edit_json(folder / "tokenizer_config.json", extra_special_tokens={"boi_token": "<s>"})
    return Processor.from_folder(folder, buckets=(96, 160))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_copies_of_a_processor(processor, how, used):
    if used:
        ask(processor)
    other = how(processor)
    assert_same(ask(other), ask(processor))
    assert ask(other).length == 96
    assert other.tokenizer.special_tokens == processor.tokenizer.special_tokens
    assert other.decode([[1, 2, 300]]) == processor.decode([[1, 2, 300]])
    stream = pickle.loads(pickle.dumps(other.tokenizer.decode_stream()))
    assert stream.push(300) + stream.finish() == other.decode([[300]])[0]


def test_copies_split_special_tokens_as_the_tokenizer_does(tmp_path):
    write_checkpoint(tmp_path, tokenizer="bytes")
    edit_json(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    tokenizer = Processor.from_folder(tmp_path).tokenizer
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), copy.copy(tokenizer)):
        assert other.encode("a</s>") == tokenizer.encode("a</s>")
        assert len(other.encode("a</s>")) > 2


def test_a_processor_in_spawned_processes(processor):
    """As the workers of a data loader."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(ask, (processor,)), ask(processor))


def test_copies_of_a_loaded_model(tmp_path):
    make_tiny_llava(tmp_path)
    vlm = vlc.load(tmp_path, dtype="float32")
    for other in (pickle.loads(pickle.dumps(vlm)), copy.deepcopy(vlm), copy.copy(vlm)):
        assert other.model == vlm.model
        assert hash(other.model) == hash(vlm.model)
        assert other.config == vlm.config
        assert_same(other.params, vlm.params)
        assert_same(other.processor(text="w1 w2"), vlm.processor(text="w1 w2"))


def test_buckets_of_load(tmp_path):
    make_tiny_llava(tmp_path)
    vlm = vlc.load(tmp_path, dtype="float32", buckets=(48, 24))
    assert vlm.processor(text="w1 w2").length == 24
    with pytest.raises(vlc.InputError, match="exceeds the largest bucket, 48"):
        vlm.processor(text="w1 " * 60)
    with pytest.raises(vlc.InputError, match="buckets="):
        vlc.load(tmp_path, buckets=(0,))
