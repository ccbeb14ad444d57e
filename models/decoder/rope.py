"""Rotary position embeddings (arXiv 2104.09864): the scalings of Llama, Mistral and Qwen2, the axes of Qwen-VL."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.models.decoder.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int, max_positions: int) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, and the factor that multiplies cos and sin.

    `dynamic` scaling stretches the frequencies only beyond `max_positions`, see `rotation`; within them it is the
    default.

    Args:
      config: kind and parameters of the scaling.
      head_dim: size of a head, even.
      max_positions: the model's `max_position_embeddings`.

    Returns:
      (f32 [head_dim / 2] radians per position, factor).
    """
    base = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.kind in ("default", "dynamic"):
        return base.astype(np.float32), 1.0
    if config.kind == "linear":
        return (base / config.factor).astype(np.float32), 1.0
    original = config.original_max_positions or max_positions
    if config.kind == "llama3":
        return _llama3(base, config, original).astype(np.float32), 1.0
    if config.kind == "yarn":
        return _yarn(base, config, head_dim, original)
    raise ValueError(f"rope kind {config.kind!r} is not one of default, linear, dynamic, yarn, llama3")


def _llama3(base: np.ndarray, config: RopeConfig, original: int) -> np.ndarray:
    # Long waves are stretched by `factor`, short ones kept, those between blended linearly in 1 / wavelength.
    turns = original * base / (2 * math.pi)  # turns within the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * base / config.factor + blend * base


def _yarn(base: np.ndarray, config: RopeConfig, head_dim: int, original: int) -> tuple[np.ndarray, float]:
    # YaRN (arXiv 2309.00071): interpolate pairs that turn fewer than beta_slow times, keep those above beta_fast.
    def pair_of(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scaled = ramp * base / config.factor + (1 - ramp) * base

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        factor = config.attention_factor
    elif config.mscale and config.mscale_all_dim:
        factor = mscale(config.mscale) / mscale(config.mscale_all_dim)
    else:
        factor = mscale(1.0)
    return scaled.astype(np.float32), factor


def axes(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Which axis each rotated pair turns by, i32 [head_dim / 2]: 0 time, 1 height, 2 width."""
    pair, sections = np.arange(head_dim // 2, dtype=np.int32), config.sections
    if sections is None or sum(sections) != head_dim // 2:
        raise ValueError(f"rope sections {sections} do not add up to {head_dim // 2}, half of head_dim {head_dim}")
    if config.interleaved:
        return np.where(pair < 3 * np.asarray(sections)[pair % 3], pair % 3, 0).astype(np.int32)
    return np.repeat(np.arange(3, dtype=np.int32), sections)


def rotation(
    positions: jax.Array, config: RopeConfig, head_dim: int, max_positions: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32 [batch, length, head_dim / 2], of integer `positions` [batch, length] or [batch, 3, length].

    Three axes are time, height and width; positions without axes, those of text, are the same on all of them.

    `dynamic` scaling goes by the last position of each row, so `positions` of padding must not lie beyond it. As in
    transformers (`dynamic_rope_update`), keys that were cached keep the frequencies of their time; unlike there, a row
    does not depend on its neighbours, nor on what was run before.
    """
    frequency, factor = frequencies(config, head_dim, max_positions)
    if positions.ndim == 3:
        # Each pair has one axis; the others add exact zeros. Elementwise, so that nothing is gathered.
        of = [np.where(axes(config, head_dim) == axis, frequency, 0)[None, None] for axis in range(3)]
        angle = sum(positions[:, axis, :, None].astype(jnp.float32) * of[axis] for axis in range(3))
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor
    stretched: np.ndarray | jax.Array = frequency[None, None]
    if config.kind == "dynamic" and config.extended(max_positions) > max_positions:
        # base ** (-2 i / head_dim) of a larger base: "NTK-aware" scaling.
        length = jnp.max(jnp.abs(positions), axis=-1)[..., None, None].astype(jnp.float32) + 1
        excess = config.factor * (jnp.maximum(length / max_positions, 1) - 1)
        exponent = -np.arange(head_dim // 2, dtype=np.float32) * 2 / (head_dim - 2)
        stretched = frequency[None, None] * (1 + excess) ** exponent[None, None]
    angle = positions[..., None].astype(jnp.float32) * stretched
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [batch, length, heads, head_dim]; cos, sin [batch, length, half]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
