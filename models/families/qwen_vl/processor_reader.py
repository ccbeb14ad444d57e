"""Reading the settings of image and video processors."""

import dataclasses
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.models.families.qwen_vl.areas import read_areas
from vlcache_jax.models.families.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.families.qwen_vl.layout import PatchLayout
from vlcache_jax.models.families.qwen_vl.videos import VideoRules
from vlcache_jax.models.images.frame_sampling import FrameSampling, read_sampling
from vlcache_jax.models.images.transform import ImageTransform

# Of transformers, where the checkpoint does not say: of an image, of a frame (Qwen2-VL, Qwen2.5-VL), of a video.
_IMAGE = 56 * 56, 28 * 28 * 1280
_FRAME = 128 * 28 * 28, 768 * 28 * 28
_VIDEO = 128 * 32 * 32, 768 * 32 * 32


def read_layout(config: QwenVLConfig, settings: dict[str, Any], source: str) -> PatchLayout:
    """See `Family.read_layout`."""
    transform, least, most = _read(config, settings, source, _IMAGE)
    of_all = config.model_type == "qwen3_vl"
    low, high = _VIDEO if of_all else _FRAME
    rules = VideoRules(
        transform=transform,
        min_pixels=low,
        max_pixels=high,
        of_all=of_all,
        sampling=FrameSampling(multiple=1 if of_all else config.vision.frame_pair),
        timestamps=of_all,
    )
    return PatchLayout(config, transform, least, most, rules)


def read_videos(layout: PatchLayout, settings: dict[str, Any], source: str) -> PatchLayout:
    """See `Family.read_videos`."""
    rules, config = layout.videos, layout.config
    transform, least, most = _read(config, settings, source, (rules.min_pixels, rules.max_pixels))
    cap = settings.get("cap_pixels_per_frame")
    if cap not in (None, True, False):
        raise CheckpointError(f"{source}: cap_pixels_per_frame = {shorten(cap)}: expected true or false")
    changed = dataclasses.replace(
        rules,
        transform=transform,
        min_pixels=least,
        max_pixels=most,
        cap_pixels_per_frame=bool(cap),
        sampling=read_sampling(rules.sampling, settings, source),
    )
    return dataclasses.replace(layout, videos=changed)


def _read(
    config: QwenVLConfig, settings: dict[str, Any], source: str, limits: tuple[int, int]
) -> tuple[ImageTransform, int, int]:
    """The transform, and the least and greatest area; `limits` are those where the settings have none."""
    vision = config.vision
    for name, own in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.merge_size),
        ("temporal_patch_size", vision.frame_pair),
    ):
        if settings.get(name, own) != own:
            raise CheckpointError(
                f"{source}: {name} = {shorten(settings[name])}, but the vision tower of config.json has {own}: make "
                "the two agree"
            )
    if settings.get("do_resize") is False:
        raise CheckpointError(f"{source}: do_resize = false is not supported: images come in sizes of all kinds")
    least, most = read_areas(settings, source, limits)
    others = {key: value for key, value in settings.items() if key not in ("size", "crop_size", "do_center_crop")}
    return ImageTransform.from_dict(others | {"do_center_crop": False}, source), least, most
