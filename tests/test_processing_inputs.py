"""The public `Processor`: how inputs may be given, buckets, decoding, and every bad input and checkpoint."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processing_checkpoint import CORPUS, PINPOINTS, TILE, edit_json, picture, write_checkpoint

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.buckets import bucket_length

WHAT = "What is <image> in this picture?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    write_checkpoint(folder, tokenizer="bytes")
    return folder


@pytest.fixture(scope="module")
def checkpoint_next(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_next")
    write_checkpoint(folder, "llava_next", tokenizer="bytes")
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor.from_folder(checkpoint)


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def broken_next(checkpoint_next, tmp_path):
    return shutil.copytree(checkpoint_next, tmp_path / "copy")


def assert_same(first: Batch, second: Batch):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_ways_to_give_the_same(processor):
    image = picture(30, 20)
    nested = processor(images=[[image]], text=[WHAT])
    assert_same(nested, processor(images=[image], text=[WHAT]))
    assert_same(nested, processor(images=image, text=[WHAT]))
    assert_same(nested, processor(images=image, text=WHAT))
    assert_same(nested, processor(images=[image], text=WHAT))
    assert_same(nested, processor(images=[[image]], text=WHAT))
    assert_same(nested, processor(images=((image,),), text=(WHAT,)))
    assert_same(nested, processor([[np.asarray(image)]], [WHAT]))
    several = processor(images=[[image, image]], text=[WHAT + WHAT])
    assert_same(several, processor(images=[image, image], text=WHAT + WHAT))
    assert_same(processor(text="Hi"), processor(images=[[]], text=["Hi"]))
    assert_same(processor(text="Hi"), processor(images=[], text="Hi"))
    assert_same(processor(text=["Hi", "Ho"]), processor(images=[None, []], text=["Hi", "Ho"]))


def test_a_row_does_not_depend_on_its_batch(checkpoint_next):
    processor = Processor.from_folder(checkpoint_next)
    images = [[picture(100, 20)], [], [picture(10, 20), picture(70, 70)]]
    texts = [WHAT, "Hi", WHAT + WHAT]
    batch = processor(images=images, text=texts)
    for row, (row_images, text) in enumerate(zip(images, texts, strict=True)):
        alone = processor(images=[row_images], text=[text])
        length, tiles = alone.lengths[0], alone.pixels.shape[1]
        assert batch.lengths[row] == length
        np.testing.assert_array_equal(batch.tokens[row, :length], alone.tokens[0, :length])
        np.testing.assert_array_equal(batch.vision_index[row, :length], alone.vision_index[0, :length])
        np.testing.assert_array_equal(batch.pixels[row, :tiles], alone.pixels[0])


def test_a_batch_without_images_has_no_tiles(processor):
    batch = processor(text=["Hi", "Ho"])
    assert batch.pixels.shape == (2, 0, TILE, TILE, 3)
    assert (batch.vision_index == TEXT).all()


def test_inputs_are_left_alone(processor):
    array = np.asarray(picture(30, 20)).copy()
    images, texts, copy = [[array]], [WHAT], array.copy()
    processor(images=images, text=texts)
    assert images[0][0] is array
    np.testing.assert_array_equal(array, copy)
    assert texts == [WHAT]


def test_a_batch_is_a_pytree_for_jit(processor):
    batch = processor(images=[picture(30, 20)], text=[WHAT])
    total = jax.jit(lambda batch: jnp.sum(batch.vision_mask))(batch)
    assert int(total) == processor.config.features_per_tile


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, 64), (64, 64), (65, 128), (512, 512), (513, 768), (4096, 4096), (4097, 5120), (5121, 6144), (20_000, 20_480)],
)
def test_default_buckets(length, bucket):
    assert bucket_length(length) == bucket


def test_buckets_and_pad_to(checkpoint):
    processor = Processor.from_folder(checkpoint, buckets=[100, 20, 50])
    assert processor(text="Hi").length == 20
    assert processor(images=picture(9, 9), text=WHAT).length == 50
    assert processor(text="Hi", pad_to=7).length == 7
    assert processor.chat([{"role": "user", "content": "Hi"}], pad_to=33).length == 33
    exact = processor(text="Hi", pad_to=int(processor(text="Hi").lengths[0]))
    assert exact.length == exact.lengths[0]
    with pytest.raises(InputError, match=r"exceeds the largest bucket, 100"):
        processor(images=[[picture(9, 9)] * 7], text=[WHAT * 7])
    for pad_to in (0, -1, 2.5, True, "9", 1):
        with pytest.raises(InputError, match=r"pad_to="):
            processor(text="What is it?", pad_to=pad_to)
    assert processor(images=[[picture(9, 9)], []], text=[WHAT, "Hi"], pad_tiles_to=3).pixels.shape[:2] == (2, 3)
    for tiles in (1, 2.5, True):
        with pytest.raises(InputError, match=r"pad_tiles_to=.* does not hold 2 tiles"):
            processor(images=[[picture(9, 9)] * 2], text=[WHAT * 2], pad_tiles_to=tiles)
    for buckets in ([], [0], [2.5], [True], ["64"], 64, "64", {}):
        with pytest.raises(InputError, match="buckets="):
            Processor.from_folder(checkpoint, buckets=buckets)
    assert Processor.from_folder(checkpoint, buckets=np.asarray([40, 30]))(text="Hi").length == 30


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "llama"])
def test_decoding(tmp_path, tokenizer):
    theirs = write_checkpoint(tmp_path, tokenizer=tokenizer).tokenizer
    ours = Processor.from_folder(tmp_path)
    texts = ["What is in this picture?", CORPUS[2], "A  café, 你好 🙂!"]
    ids = [[*theirs.encode(text), theirs.eos_token_id] for text in texts]
    expected = theirs.batch_decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == expected
    lengths = [len(row) for row in ids]
    tokens = np.full((3, max(lengths) + 5), 7)  # what follows a row's end must not count
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    assert ours.decode(SimpleNamespace(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths))) == expected
    tokens[tokens == 7] = theirs.pad_token_id
    assert ours.decode(tokens[:1]) == [theirs.decode(tokens[0], skip_special_tokens=True)]
    assert ours.decode(jnp.asarray(tokens[:1])) == ours.decode(tokens[:1].tolist())
    assert ours.decode([[], [theirs.eos_token_id]]) == ["", ""]
    assert ours.decode([[10**6]]) == [""]
    for text, row in zip(expected, ids, strict=True):
        stream = ours.tokenizer.decode_stream()
        assert "".join(stream.push(token) for token in row) == text


@pytest.mark.parametrize("out", [[1, 2], "ab", np.zeros(3, int), np.zeros((2, 3)), [[0.5]], [["a"]], None, 5, [[[1]]]])
def test_bad_decoding(processor, out):
    with pytest.raises(InputError, match="cannot be decoded"):
        processor.decode(out)


def test_decoding_of_impossible_tokens(processor):
    with pytest.raises(InputError, match="at least 0"):
        processor.decode([[-1]])
    with pytest.raises(InputError, match="lengths"):
        processor.decode(SimpleNamespace(tokens=np.zeros((2, 3), int), lengths=np.zeros(3, int)))


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, WHAT, r"row 0: the prompt holds 1 image tokens '<image>', but 0 images"),
        ([picture(9, 9)], ["Hi"], r"row 0: the prompt holds 0 image tokens '<image>', but 1 images"),
        ([[picture(9, 9)], [picture(9, 9)]], [WHAT, WHAT * 2], r"row 1: the prompt holds 2 .* but 1 images"),
        ([[], []], ["Hi"], r"images has 2 entries, but text has 1"),
        ([[]], ["Hi", "Ho"], r"images has 1 entries, but text has 2"),
        (picture(9, 9), [WHAT, WHAT], r"give a list with the images of each prompt"),
        (5, [WHAT], r"give a list with the images of each prompt"),
        ([5], [WHAT], r"row 0, image 0 is a builtins.int"),
        ([[picture(9, 9)], [None]], [WHAT, WHAT], r"row 1, image 0 is a builtins.NoneType"),
        ([["nothing.png"]], [WHAT], r"row 0, image 0 \('nothing.png'\) is missing"),
        ([[np.zeros((2, 2, 2), np.uint8)]], [WHAT], r"row 0, image 0, an array of shape \[2, 2, 2\]"),
        (None, "", r"row 0: the prompt is empty"),
        (None, ["Hi", " \n"], r"row 1: the prompt is empty"),
        (None, [], r"text is empty"),
        (None, None, r"give a str or a list of str"),
        (None, [b"Hi"], r"give a str or a list of str"),
        (None, ["Hi", 5], r"give a str or a list of str"),
        (None, "a \ud800 b", r"cannot be tokenised"),
    ],
)
def test_bad_inputs(processor, images, text, message):
    with pytest.raises(InputError, match=message):
        processor(images=images, text=text)


def test_prompts_that_no_model_could_hold_are_not_tokenised(processor):
    with pytest.raises(InputError, match=r"row 1: the prompt has 1000002 characters, far more than the model's 2048"):
        processor(text=["Hi", "a " * 500_001])


def test_counts_are_checked_before_any_image_is_opened(processor):
    with pytest.raises(InputError, match="row 1: the prompt holds 2"):
        processor(images=[["missing.png"], ["missing.png"]], text=[WHAT, WHAT * 2])


def test_missing_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*save_pretrained"):
        Processor.from_folder(broken)


def test_missing_files(broken, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Processor.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        Processor.from_folder(broken / "config.json")
    (broken / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        Processor.from_folder(broken)
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Processor.from_folder(broken)


def test_without_tokenizer_config(broken):
    """tokenizer.json alone is enough for prompts; the names of special tokens are then unknown."""
    (broken / "tokenizer_config.json").unlink()
    assert Processor.from_folder(broken)(text="Hi").tokens[0, -1] == 0


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "chat_template.json",
    ],
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"[" * 100_000, b"{}x"])
def test_malformed_json(broken, name, content):
    if name == "special_tokens_map.json":  # read only where tokenizer_config.json has no added_tokens_decoder
        edit_json(broken / "tokenizer_config.json", added_tokens_decoder=None)
    (broken / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Processor.from_folder(broken)


def test_malformed_preprocessor_config(broken):
    (broken / "processor_config.json").unlink()
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        Processor.from_folder(broken)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("size", {"longest_edge": 24}),
        ("size", {"shortest_edge": 0}),
        ("size", {"shortest_edge": 24.5}),
        ("size", {"shortest_edge": 10**9}),
        ("size", "24"),
        ("size", [24]),
        ("crop_size", {"shortest_edge": 24}),
        ("crop_size", {"height": 24}),
        ("crop_size", {"height": 24, "width": True}),
        ("resample", 9),
        ("resample", "bicubic"),
        ("resample", True),
        ("do_resize", "yes"),
        ("do_rescale", 1),
        ("rescale_factor", "1/255"),
        ("rescale_factor", float("inf")),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", 0),
        ("image_std", {"r": 1}),
        ("image_std", 1e-300),
        ("image_mean", 10**39),
        ("rescale_factor", 1e30),
        ("crop_size", {"height": 30, "width": 30}),
        ("do_center_crop", False),
    ],
)
def test_bad_image_options(broken, entry, value):
    settings = json.loads((broken / "processor_config.json").read_text())
    settings["image_processor"][entry] = value
    (broken / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=entry if entry != "do_center_crop" else "vision tower takes"):
        Processor.from_folder(broken)


@pytest.mark.parametrize(
    "pinpoints", [PINPOINTS[:2], [[TILE, TILE]], [], "x", [[TILE]], [[TILE, "x"]], [{"a": 1}], [[[1], [2]]]]
)
def test_pinpoints_that_differ_from_the_models(broken_next, pinpoints):
    settings = json.loads((broken_next / "processor_config.json").read_text())
    settings["image_processor"]["image_grid_pinpoints"] = pinpoints
    (broken_next / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        Processor.from_folder(broken_next)


def test_llava_next_with_a_class_token(broken_next):
    """transformers fails on it as well, in `pack_image_features`."""
    edit_json(broken_next / "config.json", vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match=r"full.*default"):
        Processor.from_folder(broken_next)


def test_llava_next_with_other_tiles(broken_next):
    settings = json.loads((broken_next / "processor_config.json").read_text())
    settings["image_processor"] |= {"do_center_crop": False, "crop_size": {"height": 12, "width": 12}}
    (broken_next / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="cuts tiles of 12 pixels"):
        Processor.from_folder(broken_next)


def test_an_image_token_that_is_not_the_models(broken):
    edit_json(broken / "config.json", image_token_index=3)
    with pytest.raises(CheckpointError, match="image token '<image>' has the id 4"):
        Processor.from_folder(broken)


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": 5},
        {"bos_token": {"content": 5}},
        {"bos_token": {}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": "a"}},
        {"added_tokens_decoder": {"1": {"content": "a", "lstrip": "yes"}}},
        {"extra_special_tokens": 5},
        {"extra_special_tokens": [5]},
    ],
    ids=str,
)
def test_malformed_special_tokens(broken, changes):
    edit_json(broken / "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has malformed special tokens"):
        Processor.from_folder(broken)


def test_a_chat_template_that_is_no_text(broken):
    (broken / "chat_template.jinja").unlink()
    edit_json(broken / "tokenizer_config.json", chat_template=5)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is a int"):
        Processor.from_folder(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "config.json"])
def test_links_out_of_the_folder_are_refused(broken, tmp_path, name):
    (broken / name).rename(tmp_path / "elsewhere.json")
    (broken / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
        Processor.from_folder(broken)


def test_paths_in_the_configuration_are_not_followed(broken, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    names = ("tokenizer_file", "vocab_file", "chat_template_file", "special_tokens_map_file")
    edit_json(broken / "tokenizer_config.json", **dict.fromkeys(names, str(tmp_path / "other.json")))
    assert Processor.from_folder(broken).has_chat_template


def test_the_cache_of_the_hub_is_read(broken, tmp_path):
    """There every file of a snapshot is a link to a blob."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in broken.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        os.symlink(f"../../blobs/blob-{path.name}", snapshot / path.name)
    processor = Processor.from_folder(str(snapshot))
    assert processor.has_chat_template
    assert processor(text="Hi").size == 1
