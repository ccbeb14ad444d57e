"""Pictures of more than 8 bits: a ramp stays a ramp, or is refused; files, PIL images and arrays alike."""

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.opening import load_image

RAMP = np.linspace(0, 1, 256 * 4).reshape(16, 64)
EXPECTED = np.rint(RAMP * 255)


def grey(image):
    pixels = np.asarray(load_image(image)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def ramp(white, dtype):
    return np.rint(RAMP * white).astype(dtype)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_files_of_16_bits(tmp_path, suffix):
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp(65535, np.uint16)).save(path)
    np.testing.assert_allclose(grey(path), EXPECTED, atol=1)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(grey(opened), grey(path))
        copy = opened.copy()
    np.testing.assert_array_equal(grey(copy), grey(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_files_of_16_bits_are_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = ramp(255, np.uint8)
    Image.fromarray(levels).save(tmp_path / f"8.{suffix}", exif=exif)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / f"16.{suffix}", exif=exif)
    np.testing.assert_array_equal(grey(tmp_path / f"16.{suffix}"), grey(tmp_path / f"8.{suffix}"))
    with Image.open(tmp_path / f"16.{suffix}") as opened:
        np.testing.assert_array_equal(grey(opened), grey(tmp_path / f"8.{suffix}"))


def test_a_dark_file_of_16_bits_stays_dark(tmp_path):
    """Its range is known, so its levels are never stretched."""
    path = tmp_path / "dark.png"
    Image.fromarray(ramp(255, np.uint16)).save(path)
    assert grey(path).max() == 1


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_modes_of_16_bits(mode):
    kind = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, RAMP.shape[::-1], ramp(65535, kind).tobytes())
    np.testing.assert_allclose(grey(image), EXPECTED, atol=1)


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_mode_i(tmp_path, white):
    """It has levels of any depth: the smallest of 8, 16 and 32 bits that holds them counts."""
    image = Image.fromarray(ramp(white, np.int32))
    assert image.mode == "I"
    np.testing.assert_allclose(grey(image), EXPECTED, atol=1)
    image.save(tmp_path / "ramp.tiff")
    np.testing.assert_allclose(grey(tmp_path / "ramp.tiff"), EXPECTED, atol=1)


def write_tiff(path, data, bits, sample_format, photometric=1):
    """An uncompressed grey TIFF with any tags (TIFF 6.0)."""
    entries = {
        256: RAMP.shape[1],
        257: RAMP.shape[0],
        258: bits,
        259: 1,
        262: photometric,
        277: 1,
        278: RAMP.shape[0],
        279: len(data),
        339: sample_format,
    }
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in entries.items():
        directory[tag] = value
    directory[273] = 0  # counted from the end of the directory
    with open(path, "wb") as stream:
        stream.write(b"II*\0\x08\0\0\0")
        stream.seek(directory.save(stream))
        stream.write(data)


def test_tiffs_of_other_ranges(tmp_path):
    path = tmp_path / "ramp.tiff"
    write_tiff(path, ramp(2**15 - 1, "<i2").tobytes(), 16, 2)
    np.testing.assert_allclose(grey(path), EXPECTED, atol=1)
    write_tiff(path, ramp(2**32 - 1, "<u4").tobytes(), 32, 1)
    np.testing.assert_allclose(grey(path), EXPECTED, atol=1)
    write_tiff(path, ramp(65535, "<u2").tobytes(), 16, 1, photometric=0)  # 0 is white
    np.testing.assert_allclose(grey(path), 255 - EXPECTED, atol=1)
    levels = ramp(4095, np.uint16).reshape(-1, 2)
    packed = np.stack([levels[:, 0] >> 4, (levels[:, 0] & 15) << 4 | levels[:, 1] >> 8, levels[:, 1] & 255], 1)
    write_tiff(path, packed.astype(np.uint8).tobytes(), 12, 1)
    np.testing.assert_allclose(grey(path), EXPECTED, atol=1)


def test_negative_levels_and_levels_of_no_known_range(tmp_path):
    with pytest.raises(InputError, match="row 0, image 0 has negative grey levels, to -5"):
        load_image(Image.fromarray(ramp(300, np.int32) - 5), "row 0, image 0")
    with pytest.raises(InputError, match="grey levels to 1000000, more than 16 bits but black in 32"):
        load_image(Image.fromarray(ramp(10**6, np.int32)))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_refused_with_the_remedy(tmp_path, white):
    image = Image.fromarray(ramp(white, np.float32) if white > 1 else RAMP.astype(np.float32))
    image.save(tmp_path / "ramp.tiff")
    for source in (image, tmp_path / "ramp.tiff"):
        with pytest.raises(InputError, match=r"floating-point levels .*give an array of floats in 0\.\.1, or scale"):
            load_image(source)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_arrays_of_wide_integers(dtype, channels):
    levels = np.rint(RAMP * float(np.iinfo(dtype).max)).clip(0, float(np.iinfo(dtype).max) * (1 - 1e-7)).astype(dtype)
    array = np.stack([levels] * channels, -1) if channels else levels
    np.testing.assert_allclose(grey(array), EXPECTED, atol=1)
    if dtype != np.uint16:
        np.testing.assert_array_equal(grey(ramp(255, dtype)), EXPECTED)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_arrays_of_floats(dtype):
    np.testing.assert_allclose(grey(RAMP.astype(dtype)), RAMP * 255, atol=1.2)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_8_bits_gives_the_picture(mode):
    image = Image.fromarray(EXPECTED.astype(np.uint8)).convert("RGB")
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    elif mode == "P":
        converted = image.quantize(256)
    elif mode in ("La", "RGBa", "PA"):
        converted = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "LA"}[mode]).convert(mode)
    else:
        converted = image.convert(mode)
    assert converted.mode == mode
    pixels = np.asarray(load_image(converted)).astype(int)
    if mode == "1":
        np.testing.assert_allclose(pixels[..., 0].mean(), EXPECTED.mean(), atol=3)  # dithered
    else:
        np.testing.assert_allclose(pixels, np.stack([EXPECTED] * 3, -1), atol=6)
