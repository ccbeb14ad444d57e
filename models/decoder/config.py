"""What a decoder is made of, as frozen dataclasses: hashable, so a Flax module can hold them as static attributes."""

import dataclasses

from vlcache_jax.files.exporting import static_field


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. `kind` is the `rope_type` of the config: default, linear, dynamic, yarn or llama3.

    `sections` of a model with positions on three axes, time, height and width (M-RoPE): how many pairs of a head turn
    by each, their sum half the head. Qwen2-VL: one axis after another; `interleaved` (Qwen3-VL): in turn, time first.
    """

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
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False

    def extended(self, max_positions: int) -> int:
        """Positions that a model of `max_positions` (its `max_position_embeddings`) can use with this scaling.

        `original_max_positions` is the length that the model was trained with, `max_positions` may be the extended one.
        `linear` and `dynamic` configs do not give it apart: there `max_positions` is it, and the factor comes on top.
        """
        if self.kind == "default":
            return max_positions
        return max(max_positions, int((self.original_max_positions or max_positions) * self.factor))


@static_field
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder: RMS norm, rotary positions, grouped-query attention, gated MLP; or one like Gemma 3's.

    `max_positions` is the `max_position_embeddings` of its config; the model can use `extended_positions`.
    """

    family: str  # llama, mistral, qwen2, qwen3 or gemma3_text
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
    qk_norm: bool = False  # queries and keys are normalised, head by head, before they are rotated
    branch_norms: bool = False  # what attention and MLP give is normalised before it is added
    one_plus_norms: bool = False  # norms multiply by 1 + weight, in float32
    embedding_scale: float | None = None  # of token embeddings, rounded to the dtype of the computation
    query_scale: float | None = None  # of the attention's logits; head_dim ** -0.5 by default
    logit_cap: float | None = None  # logits of the output are cap * tanh(logits / cap)
    windows: tuple[int | None, ...] = ()  # of each layer, see `ModelSpec.windows`; of no layer by default
    window_rope: RopeConfig | None = None  # rotary positions of layers with a window; `rope` by default

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows do not fit {self.num_layers} layers: give one for each")
        if self.window_rope is not None and not self.windows:
            raise ValueError("window_rope is of layers with a window, but windows names none: give both or neither")

    @property
    def extended_positions(self) -> int:
        """Positions that a prompt and its answer may have together, those of rope scaling included."""
        return self.rope.extended(self.max_positions)
