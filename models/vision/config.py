"""What a vision tower is made of: hashable, so a Flax module can hold it as a static attribute."""

import dataclasses

from vlcache_jax.files.exporting import static_field


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
