"""What the core asks of a model: the core imports no concrete one."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The sizes and token ids that caching and generation need.

    Attributes:
      num_layers: decoder layers.
      num_kv_heads: KV heads of a layer.
      head_dim: size of a head.
      max_positions: positions the model was made for; prompt and new tokens together may not pass it.
      dtype: of the computation and of the cache.
      eos_token_ids: ids that end a row.
      pad_token_id: fills the output after a row has ended.
      vision_grid: patches along one side of a tile, whose features `Batch.vision_index` counts row by row; 0 if the
        features of a tile are no such square; None if it is not known.
      vision_merge: of models whose batches have `cells`: patches along one side of what becomes a visual token; else 0.
      tower_attention: which attention `embed(batch, tower=True)` tells of (`TowerView`): "class", the class token's;
        "mean", all patches', of a tower without one; None if it tells of none.
      windows: of each layer. None: attention sees all that came before, and the layer has keys to evict. A number: it
        sees so many of the latest tokens, its own included, and stores no others; budgets are shared among the rest of
        the layers. Empty: no layer has a window.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    dtype: Any
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    vision_grid: int | None = None
    vision_merge: int = 0
    tower_attention: str | None = None
    windows: tuple[int | None, ...] = ()

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """`windows`, filled in."""
        return self.windows or (None,) * self.num_layers

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers without a window: those with something to evict."""
        return tuple(i for i, window in enumerate(self.layer_windows) if window is None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TowerView:
    """What a vision tower says of visual tokens, in the order of the prompt. A pytree; of text it may be anything.

    All of it is of the layer that gave the features, and is 0 for tokens that stand for no patches.

    Attributes:
      attention: f32 [batch, length], which each token gets of the class token, or of all patches
        (`ModelSpec.tower_attention`), averaged over heads.
      keys: [batch, length, head_dim], the token's key, averaged over heads.
      features: [batch, length, channels], what the projector makes its embedding of.
      entropy: f32 [batch, length], of the grey levels of its patch, in bits.
    """

    attention: jax.Array
    keys: jax.Array
    features: jax.Array
    entropy: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """What goes into the decoder. A pytree.

    Positions belong to the model: it says where the tokens of a prompt stand, and where the answer goes on, which after
    images need not be their number.

    Attributes:
      hidden: [batch, length, hidden].
      positions: i32 [batch, length], rotary positions, or [batch, 3, length] of a model with three axes (M-RoPE);
        those of padding are not beyond the row's last one.
      next_position: i32 [batch]. Position of the token behind the row's last one; text goes on from there by ones, on
        all axes.
      layer_inputs: [n, batch, length, hidden], n <= layers: what is added to the hidden state behind each of the first
        n layers (Qwen3-VL's deepstack); None if nothing is.
      blocks: i32 [batch, length], which tokens of a prompt see each other in both directions, by image say
        (`kernels.attention.Mask.blocks`); -1 in text and in padding. None: every token sees itself and those before.
      tower: of a model that was asked for it.
    """

    hidden: jax.Array
    positions: jax.Array
    next_position: jax.Array
    layer_inputs: jax.Array | None = None
    blocks: jax.Array | None = None
    tower: TowerView | None = None


@dataclasses.dataclass(frozen=True)
class WithOutput:
    """An `attend` that is also told how its layer goes on: attend(query, key, value, carry, xs, output).

    `output` [heads, head_dim, hidden] is what the result of each query head is multiplied with before the heads are
    added up. Only what asks for it is given it, since it may have to be made of codes.
    """

    attend: Callable[..., tuple[jax.Array, Any, Any]]

    def __call__(self, *args: Any) -> tuple[jax.Array, Any, Any]:
        return self.attend(*args)


class VisionLanguageModel(Protocol):
    """A hashable Flax Linen module with these methods, reached through `model.apply({"params": params}, ...)`."""

    @property
    def spec(self) -> ModelSpec:
        """Sizes and token ids."""

    def apply(self, variables: Any, *args: Any, method: str, **kwargs: Any) -> Any:
        """Linen's `apply`; `method` is one of

        embed(batch) -> Embedded (embed(batch, tower=True) and project_features(features) of a model with a
        `spec.tower_attention`), embed_tokens(tokens) -> [batch, length, hidden],
        decode(hidden, positions, attend, carry, xs, layer_inputs=None, layers=None, neurons=None) -> (hidden, carry,
        ys): `positions` and `layer_inputs` as in `Embedded`; positions of text may be [batch, length] whatever the
        model's axes; an `attend` that is a `WithOutput` is given one argument more; `layers` (first, end) runs a part
        of them, which only pruning asks for, and so it does for `neurons`, a function of the inputs of an MLP's last
        product, whose results come beside ys;
        unembed(hidden) -> f32 logits,
        rotate(x, positions) -> x with rotary positions (without parameters; scores of what came before rotation ask for
        it).
        """


Params = dict[str, Any]
