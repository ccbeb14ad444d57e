"""The sizes of a vision tower, and its `vision_config` as transformers 4 and 5 write it."""

import dataclasses
from typing import Any

from vlcache_jax.files.exporting import static_field
from vlcache_jax.files.limits import CHANNELS, EPSILON, HEADS, PATCHES_A_SIDE
from vlcache_jax.models.io.section import Section


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP, SigLIP or InternVL tower. `num_layers` counts those that are run: later ones never reach the features."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    qkv_bias: bool = True
    layer_scale: bool = False  # what attention and MLP give is multiplied, channel by channel

    @property
    def grid_size(self) -> int:
        """Whole patches along one side of a tile."""
        return self.image_size // self.patch_size


def read_vision(section: Section, num_layers: int, remainder: bool = False) -> VisionConfig:
    """The tower that a vision config describes, whose defaults are those of its class; `num_layers` of it are run.

    `remainder`: pixels beyond the last whole patch may be left over, of which the tower sees nothing.

    Raises CheckpointError for what is malformed or not supported.
    """
    if section.integer("num_channels", CHANNELS) != 3:
        raise section.error("num_channels", section.get("num_channels"), "3 (RGB images)")
    image_size, patch_size = section.square("image_size"), section.square("patch_size")
    if image_size < patch_size:
        raise section.error("image_size", image_size, f"at least the patch_size {patch_size}")
    if image_size % patch_size and not remainder:
        raise section.error("image_size", image_size, f"a multiple of the patch_size {patch_size}")
    if image_size // patch_size > PATCHES_A_SIDE:
        raise section.error("patch_size", patch_size, f"at most {PATCHES_A_SIDE} patches along {image_size} pixels")
    vision = VisionConfig(
        hidden_size=section.integer("hidden_size", CHANNELS),
        intermediate_size=section.integer("intermediate_size", CHANNELS),
        num_layers=num_layers,
        num_heads=section.integer("num_attention_heads", HEADS),
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=section.number("layer_norm_eps", EPSILON),
        activation=section.activation("hidden_act", ""),
    )
    if vision.hidden_size % vision.num_heads:
        raise section.error("hidden_size", vision.hidden_size, f"a multiple of {vision.num_heads} heads")
    return vision


SIGLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
"""What the configuration class of transformers fills in for a SigLIP tower's keys."""


def vision_values(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """What transformers 5 reads as a tower of this type; it describes the layers that are run."""
    return {
        "hidden_act": vision.activation,
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "model_type": model_type,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
    }
