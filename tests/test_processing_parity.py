"""Token ids, pixels and the order of visual features equal transformers' own processors and models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_checkpoint import PATCH, PINPOINTS, TILE, edit_json, picture, write_checkpoint
from transformers import LlavaNextConfig, LlavaNextModel, LlavaNextProcessor, LlavaProcessor
from transformers.image_utils import load_image

from vlcache_jax.inputs import NEWLINE, TEXT
from vlcache_jax.models.families.llava import anyres
from vlcache_jax.models.processor import Processor

SIZES = [(24, 24), (31, 17), (17, 31), (100, 9), (9, 100), (1, 1), (640, 480), (333, 500), (23, 25), (48, 24)]
PROMPTS = [
    "USER: <image>\nWhat is in this picture? ASSISTANT:",
    "<image><image> How many  objects are there?",
    "Describe the café — don't you know 你好 🙂?",
    "a <image> b<image>c <image>",
    "  <image>",
]


def batch_of_everything():
    """Rows with 0 to 3 images of odd sizes: (images, prompts)."""
    pictures = iter([picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)])
    return [[next(pictures) for _ in range(prompt.count("<image>"))] for prompt in PROMPTS], PROMPTS


def assert_equal_to_transformers(ours, theirs, images, prompts, std=0.26):
    """Row by row, as transformers pads and batches differently."""
    batch = ours(images=images, text=prompts)
    for row, (row_images, prompt) in enumerate(zip(images, prompts, strict=True)):
        expected = theirs(images=row_images or None, text=[prompt], return_tensors="np")
        length = batch.lengths[row]
        np.testing.assert_array_equal(batch.tokens[row, :length], expected["input_ids"][0])
        assert (batch.tokens[row, length:] == ours.tokenizer.pad_token_id).all()
        assert (batch.vision_index[row, length:] == TEXT).all()
        if not row_images:
            assert not batch.pixels[row].any()
            continue
        visual = batch.tokens[row, :length] == theirs.image_token_id
        np.testing.assert_array_equal(batch.vision_index[row, :length] != TEXT, visual)
        tiles = expected_tiles(theirs, row_images)
        np.testing.assert_allclose(batch.pixels[row, : len(tiles)], tiles, rtol=0, atol=1 / 255 / std)
        # The arithmetic is the same, so almost every value is the very same.
        assert (batch.pixels[row, : len(tiles)] == tiles).mean() > 0.99
        assert not batch.pixels[row, len(tiles) :].any()
        assert batch.vision_index[row].max() < len(tiles) * ours.config.features_per_tile
    return batch


def expected_tiles(theirs, images):
    """transformers' tiles of one row, [tiles, height, width, 3]."""
    per_image = [theirs.image_processor([image], return_tensors="np")["pixel_values"][0] for image in images]
    tiles = [image if image.ndim == 4 else image[None] for image in per_image]
    return np.moveaxis(np.concatenate(tiles), 1, 3)


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "llama"])
@pytest.mark.parametrize(("model_type", "select"), [("llava", "default"), ("llava", "full"), ("llava_next", "default")])
def test_equals_transformers(tmp_path, model_type, select, tokenizer):
    theirs = write_checkpoint(tmp_path, model_type, tokenizer, select=select)
    ours = Processor.from_folder(tmp_path)
    batch = assert_equal_to_transformers(ours, theirs, *batch_of_everything())
    assert batch.tokens.dtype == batch.vision_index.dtype == batch.lengths.dtype == np.int32
    assert batch.pixels.dtype == np.float32
    assert batch.length % 64 == 0


@pytest.mark.parametrize(
    "options",
    [
        {"resample": 2},
        {"resample": 0},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"rescale_factor": 1 / 127.5},
        {"do_resize": False},
        {"size": {"shortest_edge": 40}},
        {"size": {"shortest_edge": 15}},
        {"size": {"height": TILE, "width": TILE}, "do_center_crop": False},
        {"size": {"height": 11, "width": 55}},
    ],
    ids=str,
)
def test_image_options_of_llava(tmp_path, options):
    theirs = write_checkpoint(tmp_path, "llava", **options)
    images = [[picture(width, height, 9)] for width, height in SIZES]
    scale = 0.0005 if options.get("do_rescale") is False else 0.2
    assert_equal_to_transformers(Processor.from_folder(tmp_path), theirs, images, ["<image>"] * len(images), scale)


@pytest.mark.parametrize(
    "options",
    [
        {"resample": 2},
        {"do_resize": False, "size": {"height": TILE, "width": TILE}},
        {"do_normalize": False},
        {"size": {"shortest_edge": 30}},
        {"size": {"height": TILE, "width": TILE}, "do_center_crop": False},
    ],
    ids=str,
)
def test_image_options_of_llava_next(tmp_path, options):
    theirs = write_checkpoint(tmp_path, "llava_next", **options)
    images = [[picture(width, height, 5)] for width, height in SIZES]
    assert_equal_to_transformers(Processor.from_folder(tmp_path), theirs, images, ["<image>"] * len(images), 0.2)


def test_padding_to_a_square(tmp_path):
    theirs = write_checkpoint(tmp_path, "llava", image_processor="llava", do_pad=True)
    images = [[picture(width, height, 3)] for width, height in SIZES]
    assert_equal_to_transformers(Processor.from_folder(tmp_path), theirs, images, ["<image>"] * len(images))


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_files_of_transformers_4(tmp_path, model_type):
    """preprocessor_config.json, chat_template.json, added_tokens_decoder and special_tokens_map.json."""
    write_checkpoint(tmp_path, model_type, "llama")
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images |= {
        "image_processor_type": "LlavaNextImageProcessor" if model_type == "llava_next" else "CLIPImageProcessor"
    }
    if model_type == "llava":
        images |= {"size": TILE, "crop_size": TILE}  # as the first versions wrote them
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    # One token that only the configuration knows, and one whose flags it changes.
    named = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    named["4"]["lstrip"] = True
    named |= {"9000": dict(named["4"], content="<new>", lstrip=False, special=False)}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=named, tokenizer_class="LlamaTokenizer")
    edit_json(tmp_path / "tokenizer_config.json", legacy=False, add_bos_token=False, add_eos_token=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit_json(tmp_path / "config.json", text_config=text | {"vocab_size": text["vocab_size"] + 1})  # a row for <new>

    kind = LlavaNextProcessor if model_type == "llava_next" else LlavaProcessor
    theirs, ours = kind.from_pretrained(tmp_path), Processor.from_folder(tmp_path)
    images, prompts = batch_of_everything()
    assert_equal_to_transformers(ours, theirs, [*images, []], [*prompts, "What<new> is <s> it</s>"])
    assert ours.has_chat_template
    assert ours.tokenizer.encode("a <new> b") == theirs.tokenizer.encode("a <new> b")


def test_special_tokens_map_of_older_checkpoints(tmp_path):
    write_checkpoint(tmp_path, tokenizer="bytes")
    newer = ("pad_token", "eos_token", "image_token", "extra_special_tokens")
    edit_json(tmp_path / "tokenizer_config.json", **dict.fromkeys(newer))
    special = {
        "pad_token": {"content": "<stop>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    }
    special |= {"eos_token": "</s>", "additional_special_tokens": ["<extra>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    theirs, ours = LlavaProcessor.from_pretrained(tmp_path), Processor.from_folder(tmp_path)
    assert ours.tokenizer.pad_token_id == theirs.tokenizer.pad_token_id
    assert ours.tokenizer.eos_token_id == theirs.tokenizer.eos_token_id
    text = "What<stop> is<extra> it?"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == theirs.tokenizer.decode(
        theirs.tokenizer.encode(text), skip_special_tokens=True
    )


def test_padding_and_truncation_saved_in_tokenizer_json_are_ignored(tmp_path):
    theirs = write_checkpoint(tmp_path)
    padding = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit_json(tmp_path / "tokenizer.json", padding=padding, truncation=truncation)
    text = "What is in this picture?"
    assert Processor.from_folder(tmp_path).tokenizer.encode(text) == theirs.tokenizer(text)["input_ids"]


def order_in_transformers(height, width, pinpoints, tile, patch):
    """The order in which LlavaNextModel hands on features that are coded by their own index."""
    grid = tile // patch
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": tile, "patch_size": patch},
        image_grid_pinpoints=[list(pair) for pair in pinpoints],
    )
    best = anyres.select_resolution(height, width, pinpoints)
    tiles = 1 + best[0] // tile * (best[1] // tile)
    coded = torch.arange(tiles * grid**2, dtype=torch.float64).reshape(tiles, grid**2, 1)
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [coded],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([float(NEWLINE)], dtype=torch.float64),
    )
    return packed[0][:, 0].numpy().astype(np.int32)


def order_of_ours(height, width, best, tile, grid):
    return anyres.in_lines(np.arange(grid**2), anyres.feature_grid(height, width, best, tile, grid), NEWLINE)


RELEASED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # of llava-v1.6


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_feature_order_at_the_released_size(height, width):
    best = anyres.select_resolution(height, width, RELEASED)
    index = order_of_ours(height, width, best, tile=336, grid=24)
    np.testing.assert_array_equal(index, order_in_transformers(height, width, RELEASED, 336, 14))


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), patch=st.sampled_from([3, 4, 8, 12, 24]))
def test_feature_order_with_small_grids(height, width, patch):
    """Odd and tiny grids round in other ways; so do shapes whose unpadded rows vanish."""
    pinpoints = tuple((a, b) for a, b in PINPOINTS)
    best = anyres.select_resolution(height, width, pinpoints)
    index = order_of_ours(height, width, best, tile=TILE, grid=TILE // patch)
    np.testing.assert_array_equal(index, order_in_transformers(height, width, pinpoints, TILE, patch))


def test_feature_count_equals_the_processor_of_transformers(tmp_path):
    theirs = write_checkpoint(tmp_path, "llava_next")
    ours = Processor.from_folder(tmp_path)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (300, 2)).tolist():
        count = theirs._get_num_multimodal_tokens(image_sizes=[[height, width]])["num_image_tokens"][0]
        assert len(ours.layout.feature_index(height, width)) == count


def test_feature_order_of_a_batch(tmp_path):
    """The images of a row follow one another; each row counts its own tiles."""
    write_checkpoint(tmp_path, "llava_next", "bytes")
    ours = Processor.from_folder(tmp_path)
    images = [[picture(50, 20), picture(20, 61)], [picture(30, 30)]]
    batch = ours(images=images, text=["a<image>b<image>", "<image>"])
    pinpoints = tuple((a, b) for a, b in PINPOINTS)
    for row, row_images in enumerate(images):
        expected, offset = [], 0
        for image in row_images:
            order = order_in_transformers(image.height, image.width, pinpoints, TILE, PATCH)
            expected.append(np.where(order >= 0, order + offset, order))
            best = anyres.select_resolution(image.height, image.width, pinpoints)
            offset += (1 + best[0] * best[1] // TILE**2) * (TILE // PATCH) ** 2
        visual = batch.vision_index[row][batch.vision_index[row] != TEXT]
        np.testing.assert_array_equal(visual, np.concatenate(expected))
    assert batch.pixels.shape[1] == 8  # two images of four tiles


def test_pinpoints_in_another_order_in_the_image_processor(tmp_path):
    """Where two resolutions are equally good, the image processor's order decides."""
    write_checkpoint(tmp_path, "llava_next")
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"]["image_grid_pinpoints"] = PINPOINTS[::-1]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    theirs, ours = LlavaNextProcessor.from_pretrained(tmp_path), Processor.from_folder(tmp_path)
    assert_equal_to_transformers(ours, theirs, [[picture(20, 20)], [picture(24, 24)]], ["<image>", "<image>"])


def test_a_path_equals_load_image(tmp_path):
    theirs = write_checkpoint(tmp_path)
    path = tmp_path / "x.png"
    picture(50, 40).save(path)
    batch = Processor.from_folder(tmp_path)(images=[str(path)], text=["<image>"])
    np.testing.assert_array_equal(batch.pixels[0], expected_tiles(theirs, [load_image(str(path))]))
