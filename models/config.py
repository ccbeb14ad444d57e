"""What a model is made of, as frozen dataclasses: hashable, so a Flax module can hold them as static attributes."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP vision tower. `num_layers` counts the layers that are run: later ones never reach the features."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. `kind` is the `rope_type` of the config: default, linear, dynamic, yarn or llama3."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    def extended(self, max_positions: int) -> int:
        """Positions that a model of `max_positions` (its `max_position_embeddings`) can use with this scaling.

        `linear` and `dynamic` configs keep the length that the model was trained with, so the factor comes on top;
        `yarn` and `llama3` configs give that length apart, and `max_position_embeddings` may be the extended one.
        """
        if self.kind in ("linear", "dynamic"):
            return max(max_positions, int(max_positions * self.factor))
        if self.kind in ("yarn", "llama3"):
            return max(max_positions, int((self.original_max_positions or max_positions) * self.factor))
        return max_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder: RMS norm, rotary positions, grouped-query attention, gated MLP.

    `max_positions` is the `max_position_embeddings` of its config; the model can use `extended_positions`.
    """

    family: str  # llama, mistral or qwen2
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_positions: int = 4096
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    activation: str = "silu"

    @property
    def extended_positions(self) -> int:
        """Positions that a prompt and its answer may have together, those of rope scaling included."""
        return self.rope.extended(self.max_positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """LLaVA-1.5 (`llava`) or LLaVA-NeXT (`llava_next`).

    `feature_layers` index the tower's hidden states: 0 is the embedding, i the output of layer i; the last one
    equals `vision.num_layers`. Several layers are concatenated along the channels.
    """

    model_type: str
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_activation: str = "gelu"
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels; LLaVA-NeXT
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def features_per_tile(self) -> int:
        """Visual features the tower yields for one tile."""
        return self.vision.grid_size**2 + (1 if self.feature_select == "full" else 0)
