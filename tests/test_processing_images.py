"""Every kind of image a user may give, as transformers' `load_image` opens it, and every kind that is refused."""

import concurrent.futures
import contextlib
import io
import struct
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from processing_checkpoint import TILE, picture, write_checkpoint
from test_processing_parity import expected_tiles
from transformers.image_utils import load_image as load_image_of_transformers

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.opening import MAX_PIXELS, load_image
from vlcache_jax.models.processor import Processor


def same(image, other):
    np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def in_mode(mode):
    image = picture(40, 30, 1)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("RGB", "gif"),
        ("L", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpg"),
    ],
)
def test_modes_and_formats(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    in_mode(mode).save(path)
    with Image.open(path) as opened:  # given a path, transformers would leave an animation open
        expected = load_image_of_transformers(opened)
    assert load_image(path).mode == "RGB"
    same(load_image(path), expected)
    same(load_image(str(path)), expected)
    with Image.open(path) as opened:
        same(load_image(opened), expected)


@pytest.mark.parametrize("transparency", [7, bytes(range(0, 250, 10))])
def test_palette_with_transparency_gives_no_warning(tmp_path, transparency):
    path = tmp_path / "image.png"
    picture(40, 30).quantize(25).save(path, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = load_image_of_transformers(str(path))
    same(load_image(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 30).save(path, exif=exif)
    ours = load_image(path)
    assert ours.size == ((40, 30) if orientation < 5 else (30, 40))
    same(ours, load_image_of_transformers(str(path)))
    with Image.open(path) as opened:
        same(load_image(opened), ours)


def test_first_frame_of_an_animation(tmp_path):
    path = tmp_path / "image.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_arrays_equal_transformers(tmp_path):
    theirs = write_checkpoint(tmp_path)
    ours = Processor.from_folder(tmp_path)
    pixels = np.asarray(picture(50, 33, 2))
    arrays = [
        pixels,
        np.moveaxis(pixels, 2, 0),
        pixels[:, :, 0],
        pixels[:, :, :1],
        pixels.astype(np.int64),
        pixels[::-1, ::2],  # strides
    ]
    for array in arrays:
        batch = ours(images=[array], text=["<image>"])
        # transformers takes no [height, width] in a list
        three = np.ascontiguousarray(np.stack([array] * 3, axis=2) if array.ndim == 2 else array)
        np.testing.assert_array_equal(batch.pixels[0], expected_tiles(theirs, [three]))
    # What is 0..1 already must not be rescaled again; transformers takes it so with do_rescale=False.
    unit = pixels.astype(np.float32) / 255
    expected = theirs.image_processor([unit], do_rescale=False, return_tensors="np")["pixel_values"]
    batch = ours(images=[unit], text=["<image>"])
    np.testing.assert_allclose(batch.pixels[0], np.moveaxis(expected, 1, 3), rtol=0, atol=1.01 / 255 / 0.26)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (np.zeros((5, 0), np.uint8), "at least one pixel"),
        (np.zeros((5,), np.uint8), "no image"),
        (np.zeros((2, 5, 5, 3), np.uint8), "split a batch"),
        (np.zeros((5, 5, 4), np.uint8), "alpha"),
        (np.zeros((5, 5, 2), np.uint8), "no image"),
        (np.zeros((3, 5, 3), np.uint8), "first or last"),
        (np.zeros((5, 5, 3), bool), "unusable type"),
        (np.zeros((5, 5, 3), complex), "unusable type"),
        (np.full((5, 5, 3), None), "unusable type"),
        (np.full((5, 5, 3), "a"), "unusable type"),
        (np.full((5, 5, 3), np.nan), "not finite"),
        (np.full((5, 5, 3), np.inf, np.float16), "not finite"),
        (np.full((5, 5, 3), 200.0), "0..1"),
        (np.full((5, 5, 3), -0.1), "0..1"),
        (np.full((5, 5, 3), 300), "0..255"),
        (np.full((5, 5, 3), -1), "0..255"),
        (np.full((5, 5), 300, np.int16), "0..255, of which nothing says what is white"),
        (np.full((5, 5), -3, np.int32), "from -3 to -3"),
        (np.full((5, 5), 60_000, np.int32), "uint16 in 0..65535"),
        (np.full((5, 5), 10**6, np.int64), "nothing says what is white"),
        (np.full((5, 5), 200, np.uint16), "black in 16 bits: use uint8"),
        (np.float64(3), "no image"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(InputError, match=message):
        load_image(array, "row 0, image 0")


@pytest.mark.parametrize("thing", [None, 3, object(), [1, 2], b"bytes", {"a": 1}])
def test_other_types(thing):
    with pytest.raises(InputError, match=r"row 0, image 0.*give a PIL image"):
        load_image(thing, "row 0, image 0")


def test_arrays_of_other_libraries():
    import torch

    pixels = np.asarray(picture(20, 15))
    for array in (jnp.asarray(pixels), torch.tensor(pixels), jnp.moveaxis(jnp.asarray(pixels), 2, 0)):
        same(load_image(array), pixels)
    half = jnp.full((4, 5, 3), 0.5, jnp.bfloat16)
    same(load_image(half), load_image(np.full((4, 5, 3), 0.5)))
    same(load_image(np.asarray(half)), load_image(half))
    with jax.transfer_guard("disallow"):
        same(load_image(half), load_image(np.full((4, 5, 3), 0.5)))
    with pytest.raises(InputError, match=r"row 0, image 0 is a torch\.Tensor that cannot be read .*numpy\.asarray"):
        load_image(torch.zeros(5, 5, 3, requires_grad=True), "row 0, image 0")
    with pytest.raises(InputError, match=r"that cannot be read .*outside of jit"):
        jax.jit(load_image)(jnp.zeros((5, 5, 3)))
    gone = jnp.zeros((5, 5, 3))
    gone.delete()
    with pytest.raises(InputError, match=r"that cannot be read"):
        load_image(gone)


def test_images_of_jax_in_a_batch(tmp_path):
    write_checkpoint(tmp_path)
    ours = Processor.from_folder(tmp_path)
    pixels = np.asarray(picture(30, 20))
    expected = ours(images=[pixels], text=["<image>"]).pixels
    array = jnp.asarray(pixels)
    for images in (array, [array], [[array]], ((array,),)):
        np.testing.assert_array_equal(ours(images=images, text=["<image>"]).pixels, expected)
    batch = jnp.stack([array, array])
    np.testing.assert_array_equal(ours(images=list(batch), text=["<image>"] * 2).pixels[1], expected[0])
    with pytest.raises(InputError, match="split a batch"):
        ours(images=[array[None]], text=["<image>"])
    with pytest.raises(InputError, match="give a list with the images of each prompt"):
        ours(images=batch, text=["<image>"] * 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "is missing"),
        ("", "not a file|missing"),
        (".", "not a file"),
        ("a\0b", "path|missing"),
        ("x" * 5000, "path|missing"),
        ("https://example.com/x.png", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
    ],
)
def test_bad_paths(path, message):
    with pytest.raises(InputError, match=message):
        load_image(path)


def test_unreadable_files(tmp_path):
    text = tmp_path / "image.png"
    text.write_text("this is no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_image(text)
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_image(empty)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"truncated|cannot be read"):
            load_image(path)


def test_an_opened_image_whose_file_is_truncated(tmp_path):
    path = tmp_path / "image.jpg"
    picture(300, 300).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with Image.open(path) as image, pytest.raises(InputError, match="truncated"):
        load_image(image)
    with pytest.raises(InputError, match="row 0, image 0 is closed"):  # meanwhile
        load_image(image, "row 0, image 0")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif"])
@pytest.mark.parametrize("how", ["lazily", "loaded", "by with", "file", "bytes", "made"])
def test_closed_images(tmp_path, suffix, how):
    path = tmp_path / f"image.{suffix}"
    picture(40, 30).save(path)
    if how == "file":
        with path.open("rb") as stream:
            image = Image.open(stream)
    elif how == "bytes":
        with io.BytesIO(path.read_bytes()) as stream:
            image = Image.open(stream)
    elif how == "by with":
        with Image.open(path) as image:
            pass
    elif how == "made":
        image = picture(40, 30)
        image.close()
    else:
        image = Image.open(path)
        if how == "loaded":
            image.load()
        image.close()
    with pytest.raises(InputError, match=r"row 2, image 1 is closed.*path"):
        load_image(image, "row 2, image 1")


def test_a_loaded_image_outlives_its_file(tmp_path):
    path = tmp_path / "image.png"
    picture(40, 30).save(path)
    with Image.open(path) as image:
        image.load()
    path.unlink()
    same(load_image(image), picture(40, 30))


def test_corrupt_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "image"
    for suffix in ("png", "jpg", "gif", "tiff", "webp", "bmp"):
        picture(20, 20).save(tmp_path / f"good.{suffix}")
        good = np.frombuffer((tmp_path / f"good.{suffix}").read_bytes(), np.uint8)
        for _ in range(30):
            bad = good.copy()
            bad[rng.integers(0, len(bad), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(bad.tobytes())
            with contextlib.suppress(InputError):
                assert load_image(path).mode == "RGB"


def png_header(width, height):
    """The start of a PNG that claims to be this large; no memory is needed to write it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_from_the_header(tmp_path, width, height):
    assert width * height > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(InputError, match=r"million|cannot be read"):
        load_image(path)


def test_between_the_limit_of_pillow_and_ours(tmp_path):
    """Pillow warns from 89 million pixels; up to 100 million the image is simply decoded (this one is truncated)."""
    path = tmp_path / "large.png"
    path.write_bytes(png_header(9_900, 10_000))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(InputError, match="truncated"):
        load_image(path)


def test_many_threads_leave_the_warning_filters_alone(tmp_path):
    """Images are often loaded by a pool of threads, in which `warnings.catch_warnings` would break."""
    path = tmp_path / "image.png"
    picture(40, 30).quantize(25).save(path, transparency=bytes(25))
    before = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        images = list(pool.map(load_image, [path] * 200))
    assert warnings.filters == before
    for image in images:
        same(image, images[0])


def test_an_array_beyond_the_limit():
    with pytest.raises(InputError, match="million pixels"):
        load_image(np.broadcast_to(np.zeros((), np.uint8), (20_000, 20_000)))


def test_postscript_is_not_interpreted(tmp_path):
    path = tmp_path / "image.eps"
    picture(20, 20).save(path)
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_image(path)


def test_elongated_images(tmp_path):
    """Resized by the shorter edge, a strip of 1 x 200000 pixels would take 115 million."""
    write_checkpoint(tmp_path)
    ours = Processor.from_folder(tmp_path)
    with pytest.raises(InputError, match=r"row 0, image 0.*elongated"):
        ours(images=[np.zeros((1, 200_000), np.uint8)], text=["<image>"])
    assert ours(images=[np.zeros((1, 20_000), np.uint8)], text=["<image>"]).pixels.shape == (1, 1, TILE, TILE, 3)
