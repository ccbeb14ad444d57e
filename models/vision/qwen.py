"""The vision towers of Qwen2-VL (https://arxiv.org/abs/2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL (2511.21631).

They take images of any size: all patches of a row of the batch are one sequence, padded to a bucket, and say of
themselves where they lie (`cells`). Nothing here knows how many images there are, or their sizes, so one program serves
all that fit a bucket.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlcache_jax.errors import InputError
from vlcache_jax.kernels.attention import Mask
from vlcache_jax.models.activations import activation
from vlcache_jax.models.decoder.decoder import RMSNorm
from vlcache_jax.models.decoder.rope import rotate
from vlcache_jax.models.linear import dense
from vlcache_jax.models.vision.encoder import layer_norm
from vlcache_jax.models.vision.qwen_config import QwenVisionConfig
from vlcache_jax.models.vision.windows import run_attention, runs_of
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels

FRAME, TIME, ROW, COLUMN = range(4)
"""The numbers of a cell."""

_EPSILON = 1e-6
_THETA = 1e4


def _norm(x: jax.Array, rms: bool, dtype: jnp.dtype, name: str) -> jax.Array:
    return RMSNorm(_EPSILON, dtype, name=name)(x) if rms else layer_norm(x, _EPSILON, dtype, name)


def _rotation(cells: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32 [batch, patches, head_dim / 2]: half of the pairs turn by the row, half by the column."""
    frequency = _THETA ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2))
    places = cells[..., ROW : COLUMN + 1].astype(jnp.float32)
    angle = (places[..., None] * frequency[None, None, None]).reshape(*cells.shape[:2], -1)
    return jnp.cos(angle), jnp.sin(angle)


class _Attention(nn.Module):
    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, rotation: tuple[jax.Array, jax.Array], frames: jax.Array, runs: jax.Array, layer
    ) -> jax.Array:
        c = self.config
        batch, patches, channels = x_BND.shape
        projected = dense(3 * channels, self.dtype, "qkv")(x_BND).reshape(batch, patches, 3, c.num_heads, -1)
        query, key, value = (projected[:, :, i] for i in range(3))
        query, key = rotate(query, *rotation), rotate(key, *rotation)

        def attend(window: int | None, query, key, value, frames, runs):
            if window is not None:
                return run_attention(query, key, value, runs, window**2)
            mask = Mask(causal=False, segments=frames, apart=True)
            return ops.attention(Kernels(), query, key, value, mask=mask, with_lse=False)[0]

        out = ops.of_layer(c.windows, layer, attend, query, key, value, frames, runs)
        return dense(channels, self.dtype, "output")(out.reshape(x_BND.shape))


class _MLP(nn.Module):
    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        c, act = self.config, activation(self.config.activation)
        if c.gated_mlp:
            gate = act(dense(c.intermediate_size, self.dtype, "gate")(x_BND))
            x_BNF = gate * dense(c.intermediate_size, self.dtype, "up")(x_BND)
            return dense(x_BND.shape[-1], self.dtype, "down")(x_BNF)
        x_BNF = act(dense(c.intermediate_size, self.dtype, "fc1")(x_BND))
        return dense(x_BND.shape[-1], self.dtype, "fc2")(x_BNF)


class _Layer(nn.Module):
    """One layer, in the form `nn.scan` wants: the carry is the hidden state and those collected."""

    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer: jax.Array, rotation, frames, runs):
        x_BND, collected = carry
        rms = self.config.rms_norms
        normed = _norm(x_BND, rms, self.dtype, "norm_1")
        attention = _Attention(self.config, self.dtype, name="attention")
        x_BND = x_BND + attention(normed, rotation, frames, runs, layer)
        x_BND = x_BND + _MLP(self.config, self.dtype, name="mlp")(_norm(x_BND, rms, self.dtype, "norm_2"))
        wanted = self.config.deepstack_layers
        collected = tuple(jnp.where(layer == i, x_BND, old) for i, old in zip(wanted, collected, strict=True))
        return (x_BND, collected), None


class _Merger(nn.Module):
    """Squares of patches, which are consecutive, to features: [batch, patches, D] -> [batch, features, output]."""

    config: QwenVisionConfig
    dtype: jnp.dtype
    norm_last: bool = False

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        c = self.config
        wide = c.merged * x_BND.shape[-1]
        x = x_BND if self.norm_last else _norm(x_BND, c.rms_norms, self.dtype, "norm")
        x = x.reshape(x.shape[0], -1, wide)
        if self.norm_last:
            x = _norm(x, c.rms_norms, self.dtype, "norm")
        return dense(c.output_size, self.dtype, "fc2")(activation("gelu")(dense(wide, self.dtype, "fc1")(x)))


class _PatchEmbedding(nn.Module):
    config: QwenVisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        shape = (3, c.frame_pair, c.patch_size, c.patch_size, c.hidden_size)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3)), shape, jnp.float32)
        if pixels.shape[-1] * c.frame_pair == kernel.size // c.hidden_size:
            # A still image is a pair of equal frames: what all of them are multiplied with is one sum.
            kernel = kernel.astype(jnp.float32).sum(axis=1)
        x = jnp.asarray(pixels, self.dtype) @ kernel.astype(self.dtype).reshape(-1, c.hidden_size)
        if c.patch_bias:
            bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,), jnp.float32)
            x = x + bias.astype(self.dtype)[None, None]
        return x


def _stretched(table: jax.Array, cells: jax.Array, frames: jax.Array) -> jax.Array:
    """Rows of a square table [side², D], interpolated to the grid of each patch's frame: f32 [batch, patches, D].

    The corners of the table lie on those of the grid.
    """
    side = int(table.shape[0] ** 0.5)

    def taps(axis: int) -> tuple[jax.Array, jax.Array]:
        place = cells[..., axis]
        at = place * (side - 1) / jnp.maximum(frames[..., axis - ROW] - 1, 1)
        low = jnp.clip(jnp.floor(at), 0, side - 1)
        index = jnp.stack([low, jnp.minimum(low + 1, side - 1)]).astype(jnp.int32)
        return index, jnp.stack([1 - (at - low), at - low])

    (row, of_row), (column, of_column) = taps(ROW), taps(COLUMN)
    rows = table.astype(jnp.float32)
    taken = [
        (of_row[i] * of_column[j])[..., None] * rows[row[i] * side + column[j]] for i in range(2) for j in range(2)
    ]
    return taken[0] + taken[1] + taken[2] + taken[3]


def _frame_shapes(cells: jax.Array, frames: jax.Array) -> jax.Array:
    """Rows and columns of the frame that each patch lies in, i32 [batch, patches, 2]; `frames` are runs."""
    patches = cells.shape[1]

    def largest(frames: jax.Array, places: jax.Array) -> jax.Array:
        return jax.ops.segment_max(places, frames, num_segments=patches)[frames]

    return jax.vmap(largest)(frames, cells[..., ROW : COLUMN + 1]) + 1


class QwenVisionTower(nn.Module):
    """A vision tower of Qwen-VL with its merger.

    Parameters are float32 unless loaded otherwise, and stacked over layers (F and O are the MLP's and the output's
    sizes, M the patches of a feature):

        patch_embedding/{kernel [3, frames, patch, patch, D], bias [D] if patch_bias},
        position_embedding [side², D] if table_side,
        layers/{norm_1, norm_2}/{scale, bias} [L, D] (no bias with rms_norms),
        layers/attention/{qkv [L, D, 3 D], output [L, D, D]}/{kernel, bias},
        layers/mlp/{fc1, fc2} or {gate, up, down}/{kernel, bias},
        merger/norm/{scale, bias} [D], merger/{fc1 [M D, M D], fc2 [M D, O]}/{kernel, bias},
        deepstack/..., like the merger, stacked over deepstack_layers, its norm of M D channels

    Attributes:
      config: The tower's sizes.
      dtype: Of the computation and of the result. Norm statistics, rotations and softmax are float32 whatever it is.
    """

    config: QwenVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, cells: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Features of the patches of images or videos.

        Args:
          pixels: f32 [batch, patches, 3 * frames * patch²], normalised; colour before frame before pixels. `frames` is
            `config.frame_pair`, or 1 where all are still images. `config.merged` consecutive patches, which are a
            square of the grid, become a feature; those of a window are consecutive, too
            (`models.images.patches.patch_order`).
          cells: i32 [batch, patches, 4]: number of the frame within the row of the batch, from 0 on, time, and row and
            column in the frame's grid. The frame is -1 in padding, which comes last.

        Returns:
          (features [batch, patches / merged, output_size] in `dtype`, and the same of each of `deepstack_layers`,
          [n, batch, patches / merged, output_size], or None if there are none).

        Raises:
          InputError: shapes that do not fit.
        """
        c = self.config
        _check(c, pixels.shape, cells.shape)
        cells = jnp.asarray(cells)
        frame = cells[..., FRAME]
        runs = frame
        if c.window is not None:
            runs = runs_of(frame, cells[..., ROW] // c.window, cells[..., COLUMN] // c.window)

        x_BND = _PatchEmbedding(c, self.dtype, name="patch_embedding")(pixels)
        if c.table_side:
            shape = (c.table_side**2, c.hidden_size)
            table = self.param("position_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
            x_BND = x_BND + _stretched(table, cells, _frame_shapes(cells, runs_of(frame))).astype(self.dtype)

        rotation = _rotation(cells, c.hidden_size // c.num_heads)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            check_constancy_invariants=False,  # which would trace the layer once more
        )(c, self.dtype, name="layers")
        numbers = jax.lax.iota(jnp.int32, c.num_layers)
        start = (x_BND, (x_BND,) * len(c.deepstack_layers))
        (x_BND, collected), _ = layers(start, numbers, rotation, frame, runs)
        features = _Merger(c, self.dtype, name="merger")(x_BND)
        if not collected:
            return features, None
        mergers = nn.vmap(_Merger, variable_axes={"params": 0}, split_rngs={"params": True})
        return features, mergers(c, self.dtype, norm_last=True, name="deepstack")(jnp.stack(collected))


def _check(config: QwenVisionConfig, pixels: tuple[int, ...], cells: tuple[int, ...]) -> None:
    still = 3 * config.patch_size**2
    if len(pixels) != 3 or pixels[2] not in (still, still * config.frame_pair):
        raise InputError(
            f"pixels are {list(pixels)}, the vision tower takes [batch, patches, {still}] of images or "
            f"[batch, patches, {still * config.frame_pair}] of videos: build the batch with the model's processor"
        )
    if pixels[1] % config.merged:
        raise InputError(f"{pixels[1]} patches do not divide into features of {config.merged}: pad them to a multiple")
    if cells != (*pixels[:2], 4):
        raise InputError(f"cells are {list(cells)}, pixels of {list(pixels)} need {[*pixels[:2], 4]}")
