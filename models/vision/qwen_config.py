"""What a vision tower of Qwen-VL is made of: hashable, so a Flax module can hold it as a static attribute."""

import dataclasses

from vlcache_jax.files.exporting import static_field


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """The tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL; the defaults are those of the first.

    Attributes:
      output_size: channels of a feature; the decoder's hidden size.
      frame_pair: frames of a video that one patch holds.
      merge_size: patches along one side of the square that becomes one feature.
      rms_norms: root-mean-square norms instead of layer norms (Qwen2.5-VL).
      gated_mlp: an MLP with a gate (Qwen2.5-VL).
      patch_bias: whether the embedding of patches has a bias (Qwen3-VL).
      window: patches along one side of the squares within which most layers attend (Qwen2.5-VL), a multiple of
        `merge_size`; None: all layers see the whole image.
      full_layers: those that see the whole image although there is a window.
      table_side: side of the square table of learned positions, which is stretched to every image's grid (Qwen3-VL); 0
        for none.
      deepstack_layers: layers whose output becomes features of its own, for the decoder's first layers (Qwen3-VL).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    patch_size: int
    frame_pair: int = 2
    merge_size: int = 2
    activation: str = "quick_gelu"
    rms_norms: bool = False
    gated_mlp: bool = False
    patch_bias: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    table_side: int = 0
    deepstack_layers: tuple[int, ...] = ()

    @property
    def merged(self) -> int:
        """Patches of one feature."""
        return self.merge_size**2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return tuple(None if layer in self.full_layers else self.window for layer in range(self.num_layers))
