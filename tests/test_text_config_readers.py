"""Text configs of Gemma 3 and Qwen-VL, as transformers 4 and 5 write them: their ropes, windows and axes."""

import pytest
import transformers

from vlcache_jax.errors import CheckpointError
from vlcache_jax.models.decoder.config import RopeConfig
from vlcache_jax.models.decoder.rope_reader import read_rope_of_axes, read_ropes_by_kind
from vlcache_jax.models.decoder.window_reader import read_windows
from vlcache_jax.models.io.section import Section

SLIDING = RopeConfig(theta=1e4)
LINEAR = RopeConfig(theta=1e6, kind="linear", factor=8.0)


def section(values, tmp_path):
    return Section(tmp_path / "config.json", "text_config", values, {})


GEMMA = {
    # The 4B model's as released, which says nothing that the class fills in.
    "4": ({"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, LINEAR, 1024),
    "4, in full": ({
        "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": None,
    }, RopeConfig(theta=1e6), 512),
    "5": (transformers.Gemma3TextConfig(
        num_hidden_layers=8, sliding_window=512, rope_scaling={"factor": 8.0, "rope_type": "linear"}
    ).to_dict(), LINEAR, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_3(name, tmp_path):
    values, rope, window = GEMMA[name]
    text = section(values, tmp_path)
    assert read_ropes_by_kind(text, 131072) == (rope, SLIDING)
    windows = read_windows(text, 8, period=6, window=4096)
    assert windows == (window, window, window, window, window, None, window, window)


def test_layers_in_any_order(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert read_windows(section({"layer_types": kinds}, tmp_path), 3, 6, 4096) == (None, 4096, None)
    for wrong in ([*kinds, "full_attention"], ["full_attention", "linear_attention", "full_attention"], "full"):
        with pytest.raises(CheckpointError, match=r"text_config.layer_types is .* expected 3 kinds"):
            read_windows(section({"layer_types": wrong}, tmp_path), 3, 6, 4096)
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        read_windows(section({"sliding_window": 0}, tmp_path), 3, 6, 4096)


QWEN = {
    "4, as released": {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "4, saved again": {
        "rope_theta": 1e6, "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    "nothing said": {"rope_theta": 1e6},
    "5": transformers.Qwen2VLTextConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    ).to_dict(),
    "5, of 4's": transformers.Qwen2VLConfig(
        text_config={"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}
    ).to_dict()["text_config"],
}  # fmt: skip


@pytest.mark.parametrize("name", QWEN)
def test_qwen2_vl(name, tmp_path):
    found = read_rope_of_axes(section(QWEN[name], tmp_path), 128, (16, 24, 24))
    assert found == RopeConfig(theta=1e6, sections=(16, 24, 24))


def test_qwen3_vl(tmp_path):
    parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    values = transformers.Qwen3VLTextConfig(rope_parameters=parameters).to_dict()
    found = read_rope_of_axes(section(values, tmp_path), 128, (24, 20, 20), True)
    assert found == RopeConfig(theta=5e6, sections=(24, 20, 20), interleaved=True)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "yarn", "factor": 4.0}, 'rope_scaling.type is "yarn"; expected mrope or default'),
        ({"type": "mrope", "mrope_section": [16, 24]}, "three whole numbers that add up to half of head_dim 128"),
        ({"type": "mrope", "mrope_section": [16, 24, 25]}, "three whole numbers"),
        ({"type": "mrope", "mrope_section": [16, 24.0, 24]}, "three whole numbers"),
        ({"mrope_section": [16, 24, 24], "mrope_interleaved": True}, "expected false, as this model has it"),
    ],
)
def test_what_cannot_be(scaling, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_rope_of_axes(section({"rope_scaling": scaling}, tmp_path), 128, (16, 24, 24))
