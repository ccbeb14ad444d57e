"""VFlowOpt's search, and the entropy of patches against a histogram."""

import numpy as np
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.evaluation.v_flow_search import search_options, search_v_flow
from vlcache_jax.models.images.transform import CLIP_MEAN, CLIP_STD
from vlcache_jax.models.vision.patch_entropy import patch_entropy


@pytest.mark.parametrize("clip", [True, False])
def test_entropy_of_patches(clip):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (2, 13, 17))
    grey[0, :4] = 7
    grey[1, :, :8] //= 100
    colours = np.repeat(grey[..., None], 3, axis=3)  # of grey pictures the level is exact
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    found = patch_entropy(((colours / 255 - mean) / std).astype(np.float32), 4, clip)
    assert found.shape == (2, 12)
    for tile in range(2):
        for patch in range(12):
            r, c = 4 * (patch // 4), 4 * (patch % 4)
            counts = np.bincount(grey[tile, r : r + 4, c : c + 4].ravel())
            p = counts[counts > 0] / 16
            np.testing.assert_allclose(found[tile, patch], -(p * np.log2(p)).sum(), atol=1e-5)
    assert np.asarray(found)[0, :4].tolist() == [0] * 4


def test_what_cannot_work_is_refused():
    with pytest.raises(vlc.PolicyError, match="change first or second"):
        vlc.VFlowOpt(keep=0.25, first=0.9, second=1.0)
    with pytest.raises(vlc.InputError, match="trials=0"):
        search_options(lambda pruning: 0.0, 0.25, trials=0)
    with pytest.raises(vlc.InputError, match="no prompts"):
        search_v_flow(*tiny_llava(), [])
    for keep in (0.5, 0.25, 0.1, 0.05):
        parts = vlc.VFlowOpt(keep).of_model(32).parts
        sizes = np.diff([*vlc.VFlowOpt(keep).cuts(32), 32])
        assert sum(part * n for part, n in zip(parts, sizes)) / 32 == pytest.approx(keep, abs=1e-4)


@pytest.mark.thorough
def test_the_search_runs_a_model():
    """Keeping everything has a cosine of 1; what is found is at least as good as what else was tried."""
    model, params = tiny_llava(layers=4)
    batches = [ragged_batch(rows=2, length=48, seed=1)]
    found, value = search_v_flow(model, params, batches, keep=0.5, trials=3)
    again, same = search_v_flow(model, params, batches, keep=0.5, trials=3)
    assert (found, value) == (again, same)
    assert 0 < value < 1
