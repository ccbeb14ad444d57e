"""PixelPrune: which patches of an image are left out, and that those that stay lie where they lay."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax.models.families.family import EncodedImage
from vlcache_jax.models.families.qwen_vl.positions import axes_positions
from vlcache_jax.models.images.patches import cut_patches, patch_order
from vlcache_jax.models.images.repeats import without_repeats

PATCH, MERGE = 4, 2
SIDE = PATCH * MERGE


def encoded(pixels, window=None):
    order = patch_order(*(n // PATCH for n in pixels.shape[:2]), merge=MERGE, window=window)
    cells = np.pad(order.cells, ((0, 0), (2, 0)))
    n = len(order.index)
    return EncodedImage(cut_patches(pixels, order.cells, PATCH), order.index, n, "<i>" * n, cells)


def drawn(rows, columns, seed, noise=0):
    """A page: squares of few colours, so that many are as their neighbours are; with a little noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 3, (rows, columns, 1, 1, 1)) * 60
    colours = colours * np.ones((1, 1, SIDE, SIDE, 3), int) + rng.integers(0, noise + 1, (rows, columns, SIDE, SIDE, 3))
    return colours.swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE, 3).astype(np.uint8)


def expected(pixels, threshold):
    """The tokens (row, column) that stay, from the definition, one after another in the order of a page."""
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    known = {}
    stays = []

    def square(r, c):
        return pixels[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE].astype(float) / 255

    def same(u, v):
        return np.max(np.abs(u - v)) <= threshold + 1e-9

    for r in range(rows):
        for c in range(columns):
            guess = None
            if c and not r:
                guess = known[r, c - 1]
            elif r and not c:
                guess = known[r - 1, c]
            elif r and c:
                a, b, corner = known[r, c - 1], known[r - 1, c], known[r - 1, c - 1]
                guess = b if same(corner, a) and not same(corner, b) else a
            if guess is None or not same(square(r, c), guess):
                stays.append((r, c))
            known[r, c] = guess if guess is not None and same(square(r, c), guess) else square(r, c)
    return stays + [(rows - 1, columns - 1)] * ((rows - 1, columns - 1) not in stays)


@pytest.mark.parametrize("window", [None, 4 * PATCH // PATCH])
@pytest.mark.parametrize(("threshold", "noise"), [(0.0, 0), (0.05, 8), (0.25, 3)])
def test_which_stay(threshold, noise, window):
    for seed, (rows, columns) in enumerate([(5, 7), (1, 6), (6, 1), (1, 1), (4, 9)]):
        pixels = drawn(rows, columns, seed, noise)
        whole = encoded(pixels, window)
        out = without_repeats(whole, MERGE, "<i>", threshold)
        wanted = expected(pixels, threshold)
        first = out.cells[:: MERGE**2, 2:] // MERGE
        assert [tuple(place) for place in first[out.index]] == wanted
        assert out.features == len(out.index) == len(out.pixels) // MERGE**2 == out.text.count("<i>")
        # Patches are those of the whole image, in its order.
        of = {tuple(cell): patch.tobytes() for cell, patch in zip(whole.cells[:, 2:], whole.pixels)}
        assert [of[tuple(cell)] for cell in out.cells[:, 2:]] == [patch.tobytes() for patch in out.pixels]
        order = {tuple(cell): number for number, cell in enumerate(whole.cells[:, 2:])}
        numbers = [order[tuple(cell)] for cell in out.cells[:, 2:]]
        assert numbers == sorted(numbers)
        assert len(out.index) < rows * columns or rows * columns == 1


def test_photographs_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (4 * SIDE, 5 * SIDE, 3), dtype=np.uint8)
    whole = encoded(pixels)
    for field in dataclasses.fields(whole):
        one, other = (getattr(x, field.name) for x in (whole, without_repeats(whole, MERGE, "<i>", 0.0)))
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_positions_are_those_of_the_whole_image():
    """Of tokens that stay, and of the text behind: two images with text before, between and behind."""
    images = [encoded(drawn(5, 7, 0)), encoded(drawn(3, 4, 1))]

    def positions(images):
        frames, places, visual, name = [], [], [], []
        for number, image in enumerate(images):
            token = image.cells[:: MERGE**2][image.index]
            text = [(-1, 0, 0)] * 3
            frames += [x for x, _, _ in text] + [2 * number] * len(token)
            places += text + [(0, r // MERGE, c // MERGE) for r, c in token[:, 2:]]
            visual += [False] * 3 + [True] * len(token)
            name += [(number, "text", i) for i in range(3)] + [(number, *cell) for cell in token[:, 2:].tolist()]
        frames, places, visual = frames + [-1] * 2, places + [(0, 0, 0)] * 2, visual + [False] * 2
        name += [("end", i) for i in range(2)]
        arrays = np.array([len(name)], np.int32), np.array(visual)[None], np.array(frames, np.int32)[None]
        found, end = axes_positions(*map(jnp.asarray, arrays), jnp.asarray(np.array(places, np.int32).T[None]))
        return dict(zip(name, np.asarray(found)[0].T.tolist())), int(end[0])

    whole, end = positions(images)
    some, end_of_some = positions([without_repeats(image, MERGE, "<i>", 0.0) for image in images])
    assert len(some) < 0.8 * len(whole)
    assert {name: whole[name] for name in some} == some
    assert end == end_of_some
