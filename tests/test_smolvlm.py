"""SmolVLM's and Idefics3's processors against those of transformers: tiles, marks, settings; what they refuse."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import transformers
from tiny_families import pictures
from tiny_smolvlm import LONGEST, NAMED, SIDE, TOKENS, make_processor, make_tiny_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size

import vlcache_jax as vlc
from vlcache_jax.models.families.idefics3.layout import MarkedLayout
from vlcache_jax.models.families.registry import preset
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.processor import Processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    make_tiny_smolvlm(folder)
    return folder


def changed(folder, file, change):
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | change))


class Sizes(transformers.SmolVLMImageProcessorPil):
    """Resizes nothing but shapes."""

    def resize(self, image, size, resample=None, **kwargs):
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


@pytest.mark.parametrize(("longest", "side"), [(2048, 512), (1536, 384), (364, 364), (375, 100), (5000, 500)])
def test_grids_are_those_of_transformers(longest, side):
    config = preset("smolvlm2-2.2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=side))
    layout = MarkedLayout(config, ImageTransform(size=(side, side), do_center_crop=False), longest)
    shapes = [*np.random.default_rng(0).integers(1, 3000, (200, 2)).tolist(), [700, 700], [1, 4000], [4000, 1]]
    for height, width in shapes:
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        image = np.broadcast_to(np.uint8(0), (3, *get_resize_output_image_size(image, longest)))
        _, *canvas = Sizes().resize_for_vision_encoder(image, side).shape
        assert layout.grid(height, width) == tuple(edge // side for edge in canvas), (height, width)


def test_images_that_are_not_split(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    changed(tmp_path, "preprocessor_config.json", {"do_image_splitting": False})
    theirs, (image,) = make_processor(), pictures()[0]
    batch = Processor.from_folder(tmp_path)(images=[image], text="w1 <image> w2")
    inputs = theirs(images=[[image]], text=["w1 <image> w2"], return_tensors="pt", do_image_splitting=False)
    np.testing.assert_array_equal(batch.tokens[0, : batch.lengths[0]], inputs["input_ids"][0])
    np.testing.assert_allclose(batch.pixels[0], inputs["pixel_values"][0].numpy().transpose(0, 2, 3, 1), atol=1e-6)
    assert (batch.vision_index >= 0).sum() == TOKENS


def test_idefics3_is_the_same_under_another_name(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    vision = config["vision_config"] | {"model_type": "idefics3"}  # as the first SmolVLMs say
    changed(tmp_path, "config.json", {"model_type": "idefics3", "vision_config": vision})
    parts = {name: make_processor().tokenizer for name in ["tokenizer"]}
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST}, max_image_size={"longest_edge": SIDE}, image_std=[0.25] * 3
    )
    theirs = transformers.Idefics3Processor(images, **parts, image_seq_len=TOKENS)
    vlm = vlc.load(tmp_path, "float32", layout="stacked")
    for of_row in pictures()[1:3]:
        text = "w1 " + "<image> w2" * len(of_row)
        batch = vlm.processor(images=[of_row], text=[text])
        inputs = theirs(images=[of_row] if of_row else None, text=[text], return_tensors="pt")
        np.testing.assert_array_equal(batch.tokens[0, : batch.lengths[0]], inputs["input_ids"][0])
    other = vlc.load(checkpoint, "float32", layout="stacked")
    batch = other.processor(images=[pictures()[0]], text=["w1 <image>"])
    ours, same = (m.model.apply({"params": m.params}, batch, method="embed").hidden for m in (vlm, other))
    np.testing.assert_array_equal(ours, same)
    vlc.save(vlm, tmp_path / "saved")
    assert vlc.load(tmp_path / "saved", "float32").config == vlm.config
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "saved")).__name__ == "Idefics3Config"


def test_tokens_that_a_tokenizer_does_not_name(checkpoint, tmp_path):
    """Older tokenizers have them among others."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    changed(tmp_path, "tokenizer_config.json", {"extra_special_tokens": list(NAMED.values())})
    image = pictures()[4]
    ours, named = (Processor.from_folder(folder)(images=[image], text=["<image>"]) for folder in (tmp_path, checkpoint))
    np.testing.assert_array_equal(ours.tokens, named.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 64, "width": 64}}, 'size is .*; expected {"longest_edge": a whole number'),
        ({"max_image_size": {"longest_edge": 30}}, "max_image_size is .*30.*, but the vision tower takes tiles of 32"),
        ({"do_resize": False}, "the image processor makes images of"),
        ({"do_image_splitting": 1}, "do_image_splitting is 1; expected true or false"),
    ],
)
def test_what_is_refused(checkpoint, change, message, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    changed(tmp_path, "preprocessor_config.json", change)
    with pytest.raises(vlc.CheckpointError, match=message):
        Processor.from_folder(tmp_path)
