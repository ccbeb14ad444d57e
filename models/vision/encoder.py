"""What vision towers share: patches, and the layers of a pre-norm ViT (https://arxiv.org/abs/2010.11929)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlcache_jax.errors import InputError
from vlcache_jax.kernels.attention import FULL
from vlcache_jax.models.activations import activation
from vlcache_jax.models.linear import dense
from vlcache_jax.models.vision.config import VisionConfig
from vlcache_jax.parallel import ops
from vlcache_jax.parallel.ops import Kernels


def layer_norm(x: jax.Array, epsilon: float, dtype: jnp.dtype, name: str) -> jax.Array:
    # The mean is subtracted before squaring: E[x²] - E[x]² cancels badly in the tower's outlier channels.
    norm = nn.LayerNorm(epsilon, dtype=dtype, param_dtype=jnp.float32, use_fast_variance=False, name=name)
    with jax.numpy_dtype_promotion("standard"):  # Flax takes float32 statistics times the scale as it was loaded
        return norm(x)


class _Attention(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_NTD: jax.Array) -> jax.Array:
        images, tokens, channels = x_NTD.shape
        heads = self.config.num_heads

        def split(name: str) -> jax.Array:
            projected = dense(channels, self.dtype, name, self.config.qkv_bias)(x_NTD)
            return projected.reshape(images, tokens, heads, channels // heads)

        query, key, value = split("query"), split("key"), split("value")
        out, _ = ops.attention(Kernels(), query, key, value, mask=FULL, with_lse=False)
        return dense(channels, self.dtype, "output")(out.reshape(x_NTD.shape))


class _MLP(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_NTD: jax.Array) -> jax.Array:
        x_NTF = dense(self.config.intermediate_size, self.dtype, "fc1")(x_NTD)
        return dense(x_NTD.shape[-1], self.dtype, "fc2")(activation(self.config.activation)(x_NTF))


class _Layer(nn.Module):
    """One layer, in the form `nn.scan` wants: the carry is the hidden state and those collected."""

    config: VisionConfig
    dtype: jnp.dtype
    collect: tuple[int, ...]

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, tuple[jax.Array, ...]], index: jax.Array
    ) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], None]:
        x_NTD, collected = carry
        collected = tuple(
            jnp.where(index == wanted, x_NTD, old) for wanted, old in zip(self.collect, collected, strict=True)
        )
        normed = layer_norm(x_NTD, self.config.layer_norm_eps, self.dtype, "norm_1")
        x_NTD = x_NTD + self._scaled("scale_1", _Attention(self.config, self.dtype, name="attention")(normed))
        normed = layer_norm(x_NTD, self.config.layer_norm_eps, self.dtype, "norm_2")
        x_NTD = x_NTD + self._scaled("scale_2", _MLP(self.config, self.dtype, name="mlp")(normed))
        return (x_NTD, collected), None

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        if not self.config.layer_scale:
            return branch
        scale = self.param(name, nn.initializers.constant(0.1), (self.config.hidden_size,), jnp.float32)
        return branch * scale.astype(self.dtype)[None, None]


class PatchEmbedding(nn.Module):
    """Pixels f32 [images, height, width, 3] -> [images, patches, D]: one matrix product; `use_bias` adds one."""

    config: VisionConfig
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        images, height, width, colours = pixels_NHWC.shape
        patch, channels = self.config.patch_size, self.config.hidden_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (patch, patch, colours, channels), jnp.float32)
        # Patches do not overlap, so the convolution is one matrix product over flattened patches.
        rows, columns = height // patch, width // patch
        whole = jnp.asarray(pixels_NHWC, self.dtype)[
            :, : rows * patch, : columns * patch
        ]  # as a convolution leaves out
        x = whole.reshape(images, rows, patch, columns, patch, colours)
        x = x.swapaxes(2, 3).reshape(images, -1, patch * patch * colours)
        x = x @ kernel.astype(self.dtype).reshape(-1, channels)
        if not self.use_bias:
            return x
        return x + self.param("bias", nn.initializers.zeros, (channels,), jnp.float32).astype(self.dtype)[None, None]


def encoder(config: VisionConfig, dtype: jnp.dtype, x: jax.Array, feature_layers: tuple[int, ...]) -> jax.Array:
    """Runs the layers of a tower, a scan named "layers", on the embedded patches x [images, tokens, D].

    Returns the hidden states `feature_layers`, concatenated along the channels: 0 is `x`, i the output of layer i.
    """
    # The last hidden state is the scan's carry; only earlier ones cost a buffer each.
    collect = tuple(sorted({i for i in feature_layers if i < config.num_layers}))
    states: dict[int, jax.Array] = {0: x}
    if config.num_layers:
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            check_constancy_invariants=False,  # which would trace the layer once more
        )(config, dtype, collect, name="layers")
        (x, collected), _ = layers((x, (x,) * len(collect)), jax.lax.iota(jnp.int32, config.num_layers))
        states = dict(zip(collect, collected, strict=True)) | {config.num_layers: x}
    return jnp.concatenate([states[i] for i in feature_layers], axis=-1)


def check_images(
    config: VisionConfig,
    height: int,
    width: int,
    feature_layers: tuple[int, ...],
    position_ids: jax.Array | None,
) -> None:
    """Raises InputError if what a tower is called with does not fit it."""
    if not feature_layers or not all(0 <= i <= config.num_layers for i in feature_layers):
        raise InputError(
            f"feature_layers {feature_layers} must be one or more of 0..{config.num_layers}, "
            f"the hidden states of a vision tower of {config.num_layers} layers"
        )
    if position_ids is None:
        if (height, width) != (config.image_size, config.image_size):
            raise InputError(
                f"images are {height}x{width}, the vision tower takes {config.image_size}x"
                f"{config.image_size}; resize them, or pass position_ids to encode a sub-grid"
            )
        return
    patch = config.patch_size
    if height % patch or width % patch:
        raise InputError(f"image sides {height}x{width} must be multiples of the patch size {patch}")
    patches = (height // patch) * (width // patch)
    if position_ids.shape != (patches,):
        raise InputError(
            f"position_ids has shape {tuple(position_ids.shape)}, a {height}x{width} image needs ({patches},)"
        )
