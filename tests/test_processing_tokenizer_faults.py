"""A tokenizer.json is data from others: panics, failures and steps without end become named errors."""

import json

import pytest
from processing_checkpoint import build_tokenizer, edit_json, picture, write_checkpoint
from tokenizers import Tokenizer as Library
from transformers import LlavaProcessor

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import Tokenizer
from vlcache_jax.models.text.tokenizer_library import library_errors


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path)
    return tmp_path


def replaced(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


PIECES = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "nope", "continuing_subword_prefix": "##"}
PIECES |= {"max_input_chars_per_word": 100}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot tokenise a short text .chunk size"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "nope"}}, "UNK"),
        ({"model": PIECES}, "UNK"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "nope"}}, "cannot tokenise|unk"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "no valid tokenizer|cannot tokenise"),
        ({"model": {"type": "Unigram", "vocab": [], "unk_id": None}}, "no valid tokenizer|cannot tokenise"),
        ({"model": None}, "no valid tokenizer"),
        ({"version": "9"}, "no valid tokenizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "1.1e.12 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 5000}}, "5e.03 times longer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2000}}, "2001 steps"),
        ({"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}}, "the decoder .* times longer"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_used(folder, changes, message):
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*({message})"):
        Processor.from_folder(replaced(folder, **changes))


def test_a_panic_on_one_text_only(folder, monkeypatch):
    """What the short text at opening does not meet is an error where it is met."""

    class PanicException(BaseException):
        """As pyo3's, which no module exports."""

    class Backend:
        def __getattr__(self, name):
            return getattr(ours.tokenizer.backend, name)

        def encode(self, *_, **__):
            raise PanicException("a slice out of range")

        decode = encode

    ours = Processor.from_folder(folder)
    broken = Tokenizer(Backend(), ours.tokenizer.special_tokens)
    with pytest.raises(CheckpointError, match=r"'some text' cannot be tokenised .*a slice out of range"):
        broken.encode("some text")
    with pytest.raises(CheckpointError, match=r"\[1, 2\] cannot be decoded .*a slice out of range"):
        broken.decode([1, 2])
    stream = broken.decode_stream()
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        stream.push(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_ctrl_c_and_exits_pass(error):
    with pytest.raises(error), library_errors(lambda _: CheckpointError("caught")):
        raise error


def test_ids_that_no_tokenizer_has(folder):
    ours = Processor.from_folder(folder)
    for ids in ([-1], [2**32], [10**30]):
        with pytest.raises(InputError, match="must be at least 0"):
            ours.tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "llama"])
def test_common_tokenizers_pass(tokenizer):
    text = build_tokenizer(tokenizer).to_str()
    assert Library.from_str(text).get_vocab_size() > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": "1", "add_eos_token": "1"},
        {"add_bos_token": {}},
        {"add_bos_token": True, "add_eos_token": True},
        {"boi_token": "<zz>"},
        {"boi_token": ""},
        {"boi_token": None},
        {"boi_token": 5},
        {"boi_token": ["<zz>"]},
        {"boi_token": {"content": "<zz>"}},
        {"boi_token": {"__type": "AddedToken", "content": "<zz>", "special": True}},
        {"pad_token": "<zz>"},
        {"pad_token": {"__type": "AddedToken", "content": "<zz>", "special": True}},
        {"pad_token": None},
        {"unk_token": "1"},
        {"sep_token": ""},
        {"extra_special_tokens": {"video_token": "<zz>"}},
        {"extra_special_tokens": ["<zz>", "1"]},
        {"model_specific_special_tokens": {"video_token": "<zz>"}},
        {"clean_up_tokenization_spaces": True},
    ],
    ids=str,
)
def test_entries_whose_names_end_in_token(tmp_path, changes):
    """A flag is no token, and of a model's own entries only texts and objects that say so are, as in transformers."""
    write_checkpoint(tmp_path, tokenizer="llama")
    edit = json.loads((tmp_path / "tokenizer_config.json").read_text()) | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(edit))
    theirs, ours = LlavaProcessor.from_pretrained(tmp_path).tokenizer, Processor.from_folder(tmp_path).tokenizer
    text = "Hi <zz> 1 what<s> is <video>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.bos_token == theirs.bos_token
    assert ours.special_tokens.get("pad_token") == theirs.pad_token


STEPS = ["do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_pad"]


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_null_is_left_out_as_in_transformers(tmp_path, model_type, step):
    from test_processing_parity import expected_tiles

    # Of this shape, the picture fits the tower without cropping.
    theirs = write_checkpoint(tmp_path, model_type)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"][step] = None
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    theirs = type(theirs).from_pretrained(tmp_path)
    images = [picture(24, 24, 3)]
    if model_type == "llava" and step == "do_center_crop":
        assert expected_tiles(theirs, [picture(24, 48)]).shape[1:3] == (48, 24)  # which the tower would refuse
        with pytest.raises(CheckpointError, match="vision tower takes"):
            Processor.from_folder(tmp_path)
        return
    batch = Processor.from_folder(tmp_path)(images=[images], text=["<image>"])
    tolerance = 2 if step == "do_rescale" else 1 / 255 / 0.2
    assert abs(batch.pixels[0] - expected_tiles(theirs, images)).max() < tolerance


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("do_resize", "size"),
        ("do_resize", "resample"),
        ("do_center_crop", "crop_size"),
        ("do_rescale", "rescale_factor"),
        ("do_normalize", "image_mean"),
        ("do_normalize", "image_std"),
    ],
)
def test_what_a_step_needs_must_not_be_null(folder, step, name):
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"][name] = None
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"{name} = null is not supported: {step} needs it"):
        Processor.from_folder(folder)
    with pytest.raises(ValueError, match="must"):
        LlavaProcessor.from_pretrained(folder).image_processor([picture(30, 20)])
    if step != "do_center_crop":  # without it, pictures of any shape would reach the vision tower
        settings["image_processor"][step] = False
        (folder / "processor_config.json").write_text(json.dumps(settings))
        assert Processor.from_folder(folder)(images=picture(24, 24), text="<image>").pixels.any()


def test_no_tokens_are_added_by_flags(folder):
    edit_json(folder / "tokenizer_config.json", add_bos_token="<flag>", add_eos_token="<flag>")
    assert Processor.from_folder(folder).tokenizer.token_to_id("<flag>") is None
