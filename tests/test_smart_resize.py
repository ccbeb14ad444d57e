"""Sizes and patches of images in front of Qwen-VL's tower, exactly those of transformers."""

import numpy as np
import pytest
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.patches import cut_patches, patch_order
from vlcache_jax.models.images.smart_resize import smart_resize

QWEN2, QWEN3 = (28, 3136, 12_845_056), (32, 65_536, 16_777_216)


@pytest.mark.parametrize(
    ("shape", "of_qwen2", "tokens", "tokens_of_qwen3"),
    [
        ((480, 640), (476, 644), 391, 300),
        ((1080, 1920), (1092, 1932), 2691, 2040),
        ((2200, 1700), None, 4819, 3657),
        ((336, 336), (336, 336), 144, 100),
        ((30, 30), (56, 56), 4, 64),
    ],
)
def test_published_sizes(shape, of_qwen2, tokens, tokens_of_qwen3):
    for (factor, low, high), want in ((QWEN2, tokens), (QWEN3, tokens_of_qwen3)):
        rows, columns = smart_resize(*shape, factor=factor, min_pixels=low, max_pixels=high)
        assert rows * columns == want * factor**2
        assert factor == 32 or of_qwen2 in (None, (rows, columns))


@pytest.mark.parametrize(("factor", "low", "high"), [QWEN2, QWEN3, (28, 3136, 200_704), (4, 64, 512)])
def test_sizes_equal_transformers(factor, low, high):
    rng = np.random.default_rng(factor)
    shapes = [(14, 42), (1, 200), (200, 1), (1, 1), (70, 98), *np.exp(rng.uniform(0, 9, (500, 2))).astype(int).tolist()]
    for height, width in shapes:
        ours = {"factor": factor, "min_pixels": low, "max_pixels": high}
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match="aspect ratio"):
                theirs.smart_resize(height, width, **ours)
            with pytest.raises(InputError, match=f"row 3, image 1 is {width} x {height} pixels"):
                smart_resize(height, width, **ours, name="row 3, image 1")
        else:
            assert smart_resize(height, width, **ours) == theirs.smart_resize(height, width, **ours)


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (6, 10), (8, 8), (10, 2)])
@pytest.mark.parametrize("window", [None, 4, 8])
def test_order_equals_transformers(grid, window):
    import torch

    order = patch_order(*grid, merge=2, window=window)
    want = get_vision_position_ids(torch.tensor([[1, *grid]]), 2).numpy()
    permuted = np.arange(len(want) // 4)
    if window is not None:
        permuted = get_vision_window_index(torch.tensor([[1, *grid]]), 2, window * 14, 14)[0].numpy()
    np.testing.assert_array_equal(order.cells, want.reshape(-1, 4, 2)[permuted].reshape(-1, 2))
    np.testing.assert_array_equal(order.index, np.argsort(permuted))
    assert order.cells.dtype == order.index.dtype == np.int32


def test_patches_equal_transformers():
    image = np.random.default_rng(0).normal(size=(12, 20, 3)).astype(np.float32)
    processor = theirs.Qwen2VLImageProcessorPil()
    want, rows, columns = processor.patchify(image.transpose(2, 0, 1), 2, 2, 2)
    assert (rows, columns) == (6, 10)
    cells = patch_order(rows, columns, merge=2).cells
    np.testing.assert_array_equal(cut_patches(np.stack([image, image]), cells, 2), want)
    still = cut_patches(image, cells, 2)
    np.testing.assert_array_equal(still.reshape(60, 3, 1, 4).repeat(2, axis=2).reshape(60, -1), want)
