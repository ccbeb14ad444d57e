"""The picture of what was kept, and the map from visual tokens to places in the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.errors import InputError
from vlcache_jax.explain.pictures import _Sheet, _wrap, explain, kept_by_layer
from vlcache_jax.inference.report import Report
from vlcache_jax.inputs import NEWLINE, TEXT, Batch
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.layout import VisionLayout
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.vision.config import VisionConfig

PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))


def layout(next: bool = False, select: str = "default", **transform: Any) -> VisionLayout:
    """Tiles of 32 pixels, 4 x 4 patches each."""
    vision = VisionConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, image_size=32, patch_size=8)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_layers"), 8)
    config = LlavaConfig(
        model_type="llava_next" if next else "llava",
        vision=vision,
        decoder=DecoderConfig(family="llama", num_heads=1, num_kv_heads=1, head_dim=8, **sizes),
        image_token_id=4,
        feature_layers=(1,),
        feature_select=select,
        grid_pinpoints=PINPOINTS if next else (),
    )
    return VisionLayout(config, ImageTransform(size=32, crop_size=(32, 32), **transform))


def test_regions_of_a_centre_crop() -> None:
    regions = layout().token_regions([(40, 80)])[0].reshape(4, 4, 4)
    np.testing.assert_allclose(regions[0, 0], [20, 0, 30, 10])
    np.testing.assert_allclose(regions[3, 3], [50, 30, 60, 40])


def test_regions_of_a_padded_square() -> None:
    regions = layout(pad_to_square=True).token_regions([(40, 80)])[0].reshape(4, 4, 4)
    np.testing.assert_allclose(regions[0, 0], [0, -20, 20, 0])  # all padding
    np.testing.assert_allclose(regions[2, 3], [60, 20, 80, 40])


def test_class_token_has_no_place() -> None:
    regions = layout(select="full").token_regions([(32, 32)])[0]
    assert len(regions) == 17
    assert np.isnan(regions[0]).all()
    assert np.isfinite(regions[1:]).all()


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (61, 67), (30, 100), (200, 50)])
@pytest.mark.parametrize("next", [False, True])
def test_regions_are_where_the_tower_sees_them(shape: tuple[int, int], next: bool) -> None:
    """A bright spot lights the patches whose regions hold it, in every view of the image."""
    height, width = shape
    map_of = layout(next)
    regions, index = map_of.token_regions([shape])[0], map_of.feature_index(*shape)
    assert len(regions) == len(index)
    assert (np.isnan(regions[:, 0]) == (index == NEWLINE)).all()
    side = max(6, min(shape) // 6)
    for down, right in ((0, 0), (-0.2, 0.1), (0.2, -0.1)):  # of the shorter edge: a centre crop keeps that
        top = round(height / 2 + down * min(shape) - side / 2)
        left = round(width / 2 + right * min(shape) - side / 2)
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[top : top + side, left : left + side] = 255
        tiles = map_of.tiles(Image.fromarray(pixels)).astype(float)
        light = tiles.reshape(-1, 4, 8, 4, 8, 3).mean(axis=(2, 4, 5)).reshape(-1)
        views = [slice(0, 16), slice(16, None)] if next else [slice(0, 16)]
        for view in views:
            of_token = np.where(index[view] >= 0, light[index[view]], 0)
            assert of_token.max() > 0
            box = regions[view][of_token.argmax()]
            assert box[0] - 1 < left + side
            assert box[2] + 1 > left
            assert box[1] - 1 < top + side
            assert box[3] + 1 > top


def test_fine_regions_cover_the_image() -> None:
    regions = layout(next=True).token_regions([(61, 67)])[0][16:]
    regions = regions[np.isfinite(regions[:, 0])]
    slack = 8 * 67 / 64  # a patch
    assert abs(regions[:, 0].min()) < slack
    assert abs(regions[:, 2].max() - 67) < slack
    assert abs(regions[:, 1].min()) < slack
    assert abs(regions[:, 3].max() - 61) < slack


def test_heat_lies_in_the_region() -> None:
    picture = Image.new("RGB", (400, 400), (200, 200, 200))
    sheet = _Sheet.arrange([picture, picture], [layout().token_regions([(400, 400)])[0]] * 2)
    share = np.zeros(32, np.float32)
    share[16 + 6] = 0.5  # of the second image: row 1, column 2
    y, x = np.nonzero(sheet.heat(share) == 0.5)
    side = sheet.image.height
    start = sheet.image.width - side
    assert abs(x.min() - (start + side / 2)) <= 1
    assert abs(x.max() - (start + side * 3 / 4)) <= 1
    assert abs(y.min() - side / 4) <= 1
    lit, plain = (np.asarray(sheet.overlay(s), int) for s in (share, 0 * share))
    changed = np.abs(lit - plain).max(axis=2) > 0
    np.testing.assert_array_equal(changed, sheet.heat(share) > 0)


def case(images: list[Image.Image], layers: int, next: bool = False) -> tuple[Batch, list[np.ndarray], Report, Any]:
    """A batch of one row whose layers kept every fifth token or so."""
    map_of = layout(next)
    index = [map_of.feature_index(image.height, image.width) for image in images]
    vision_index = np.concatenate([np.full(3, TEXT), *index, np.full(5, TEXT)])
    length = len(vision_index)
    batch = Batch(vision_index[None], np.array([length]), vision_index[None], np.zeros((1, 0, 32, 32, 3)))
    kept = [
        np.stack([np.arange(head, length, 5 + layer % 3)[: length // 8] for head in range(2)])
        for layer in range(layers)
    ]
    counts = np.array([[of_layer.shape[1] for of_layer in kept]])
    flags = (np.array([True]), np.array([0.1]))
    report = Report(counts, np.array([length]), counts, *flags, "vl_cache", 0.1, 10**6, 10**7, 0)
    return batch, kept, report, map_of


@pytest.mark.parametrize(
    ("sizes", "layers", "next"),
    [([], 3, False), ([(60, 40)], 1, False), ([(60, 40), (40, 60), (50, 50)], 12, False), ([(20, 90)], 80, True)],
)
def test_draws_all_sorts(sizes: list[tuple[int, int]], layers: int, next: bool) -> None:
    images = [Image.new("RGB", size, (90, 120, 150)) for size in sizes]
    batch, kept, report, map_of = case(images, layers, next)
    long = "What is this, and why is it so long? " * 20
    picture = explain(images, batch, kept, report, map_of, question=long, answer=long)
    assert picture.width == 1600
    assert 400 < picture.height < 2500
    pixels = np.asarray(picture)
    for edge in (pixels[:20], pixels[-20:], pixels[:, :30], pixels[:, -30:]):
        assert (edge == 255).all()  # nothing reaches the margins


def test_refuses_what_does_not_fit() -> None:
    image = Image.new("RGB", (40, 40))
    batch, kept, report, map_of = case([image], 2)
    with pytest.raises(InputError, match="row=1 does not exist"):
        explain([image], batch, kept, report, map_of, row=1)
    with pytest.raises(InputError, match="the 2 images have 32 visual tokens, row 0 of the batch has 16"):
        explain([image, image], batch, kept, report, map_of)


def test_long_text_is_cut() -> None:
    assert _wrap("", 20, 300, 2) == []
    lines = _wrap("word " * 100, 20, 300, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert _wrap("x" * 500, 20, 300, 2)[0].endswith("…")


@pytest.mark.parametrize("next", [False, True])
def test_state_of_a_ragged_batch(tmp_path: Path, next: bool) -> None:
    """A state says the same as its kept positions, for a row that is not the first."""
    make_tiny_llava(tmp_path, next=next)
    vlm = vlc.load(tmp_path, dtype="float32")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 70, 3), dtype=np.uint8)) for _ in range(2)]
    batch = vlm.processor(images=[[], images], text=["w1 w2 w3 w4", "<image> w1 <image> w2 w3"])
    policy = vlc.VLCache(0.3)
    ctx = vlc.compress(vlm.model, vlm.params, batch, policy)
    _, state = ctx.start(4)
    out = vlc.generate(vlm.model, vlm.params, batch, policy, 4)
    by_layer = kept_by_layer(ctx, 1)
    for layer, kept in enumerate(by_layer):
        theirs = np.asarray(state.kept_positions(layer)[1])
        assert [set(a[a >= 0]) for a in kept] == [set(a[a >= 0]) for a in theirs]
    drawn = explain(images, batch, ctx, out.report, vlm.processor.layout, row=1)
    again = explain(images, batch, by_layer, out.report, vlm.processor.layout, row=1)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(again))
