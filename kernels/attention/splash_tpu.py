"""JAX's splash attention for TPUs: grouped queries, blocks above the diagonal skipped, the log-sum-exp returned.

Its mask must be static; what may be data is a segment of each token, none of which is shared. Which tokens are an image
is data, too: what a token sees of its image behind itself is a second attention, above the diagonal, with images for
segments, and the two are merged by their log-sum-exps.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vlcache_jax.kernels.attention import xla_wide
from vlcache_jax.kernels.attention.mask import Mask
from vlcache_jax.kernels.merge import merge
from vlcache_jax.kernels.varying import refuse_if_checked

_SHORTEST = 128  # the smallest block; shorter prompts are cheap in XLA
_SHORTEST_FULL = 640  # of a vision tower: where filling up the blocks would cost as much as logits in memory do
_FILLING = jnp.iinfo(jnp.int32).min  # the segment of what fills the last block


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    lengths: jax.Array | None,
    *,
    scale: float,
    with_lse: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.attention`. `lengths` changes nothing: the mask keeps the padding out."""
    del lengths
    length, head_dim = query.shape[1], query.shape[3]
    if mask.segments is not None and not mask.apart:
        raise NotImplementedError("splash_tpu has no segments with a shared prefix: use implementation='xla_wide'")
    if mask.segments is not None and (mask.blocks is not None or mask.places is not None):
        raise NotImplementedError("splash_tpu has no segments beside blocks or places: use implementation='xla_wide'")
    if not mask.causal and (mask.window is not None or mask.blocks is not None):
        raise NotImplementedError("splash_tpu has no window without causality: use implementation='xla_wide'")
    refuse_if_checked("splash_tpu")
    shortest = _SHORTEST if mask.causal else _SHORTEST_FULL
    if length < shortest:
        raise NotImplementedError(
            f"splash_tpu takes {'prompts' if mask.causal else 'images'} of at least {shortest} tokens, not {length}"
        )
    if head_dim > 256:
        raise NotImplementedError(f"splash_tpu serves heads of up to 256, not {head_dim}")
    if with_lse or mask.blocks is not None:
        out, lse = _attention(query, key, value, mask, scale, interpret)
        return out, lse if with_lse else None
    return _without_lse(query, key, value, mask, scale, interpret), None


def _block(mask: splash.Mask, index: tuple[slice, slice], window: int | None) -> np.ndarray:
    (top, bottom, _), (left, right, _) = (x.indices(size) for x, size in zip(index, mask.shape, strict=True))
    height, width = bottom - top, right - left
    ahead = min(max(left - top, -width - (window or 0)), height)
    return _causal_block(height, width, ahead, window)


class _CausalMask(splash.CausalMask):
    """The same mask, whose blocks are not computed one by one: all but those on the diagonal are one of two.

    The kernel is made, and looks at every block, on whatever platform the op is traced; at 32k tokens that took
    seconds.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return _block(self, index, None)


class _AheadMask(splash.LocalMask):
    """The opposite: what comes after a token."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape, (-1, None), 0)  # from one token after its own on

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return ~_block(self, index, None)


class _WindowMask(splash.LocalMask):
    """A causal mask with a window, its blocks like those of `_CausalMask`; blocks out of the window are skipped."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        left = self.window_size[0]
        assert left is not None
        return _block(self, index, left + 1)


@cache
def _causal_block(height: int, width: int, ahead: int, window: int | None) -> np.ndarray:
    """bool [height, width]: whether a row sees a column, the first column being `ahead` of the first row."""
    distance = np.arange(height)[:, None] - (np.arange(width) + ahead)
    block = (distance >= 0) & (distance < (window or np.inf))
    block.setflags(write=False)
    return block


def _block_size(length: int, causal: bool) -> int:
    """Of queries and keys: up to 512, a multiple of 128."""
    if causal:  # in bigger blocks more is computed above the diagonal
        return 512 if length >= 1024 else 256 if length >= 512 else 128
    return -(-length // (-(-length // 512) * 128)) * 128  # what fills the last one is computed for nothing


def _forward(query, key, value, mask, scale, interpret, with_lse=True):
    length, heads = query.shape[1:3]
    block = _block_size(length, mask.causal)
    padded = -(-length // block) * block
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # the kernel has no scale of its own
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0))) for x in (query, key, value))
    shape = padded, padded
    names: tuple[str, ...] = ("block_q", "block_kv")
    if not with_lse:  # with it there is no backward kernel
        names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block))  # type: ignore[arg-type]

    def kernel(seen: splash.Mask, *arrays: Any) -> Any:
        make = splash.make_splash_mha_single_device
        masks = splash.MultiHeadMask([seen] * heads)
        return jax.vmap(make(masks, block_sizes=sizes, save_residuals=with_lse, interpret=interpret))(*arrays)

    def by_row(x: jax.Array) -> jax.Array:  # [batch, heads, padded, ...] -> [batch, length, heads, ...]
        return x[:, :, :length].swapaxes(1, 2)

    def filled(ids: jax.Array, with_: int) -> jax.Array:
        return jnp.pad(ids, ((0, 0), (0, padded - length)), constant_values=with_)

    with jax.enable_x64(False):  # where a gradient traces this once more, `dispatch` has left the 64-bit mode on
        seen: splash.Mask = _CausalMask(shape) if mask.causal else splash.FullMask(shape)
        if mask.window is not None:
            seen = _WindowMask(shape, (mask.window - 1, 0), 0)
        segments = mask.segments
        if segments is None and not mask.causal and padded > length:  # nothing else keeps the filling out
            segments = jnp.zeros(query.shape[:2], jnp.int32)
        own = () if segments is None else (splash.SegmentIds(*[filled(segments, _FILLING)] * 2),)
        if not with_lse:
            return by_row(kernel(seen, q, k, v, *own)).astype(value.dtype), None
        out, (lse,) = kernel(seen, q, k, v, *own)
        out, lse = by_row(out), by_row(lse)
        if mask.blocks is not None:
            ids = filled(mask.blocks, -1)
            images = splash.SegmentIds(jnp.where(ids < 0, -1, ids), jnp.where(ids < 0, -2, ids))  # text meets nothing
            behind, (weight,) = kernel(_AheadMask(shape), q, k, v, images)  # the weight of nothing is exp(-2e38)
            out, lse = merge([(out.astype(jnp.float32), lse), (by_row(behind).astype(jnp.float32), by_row(weight))])
    return out.astype(value.dtype), lse


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _without_lse(query, key, value, mask, scale, interpret):
    return _forward(query, key, value, mask, scale, interpret, with_lse=False)[0]


def _pull_back(query, key, value, mask, scale, interpret):
    with jax.enable_x64(False):  # JAX's kernel and its gradient fail in 64-bit mode
        forward = partial(_forward, mask=mask, scale=scale, interpret=interpret, with_lse=False)
        return jax.vjp(lambda q, k, v: forward(q, k, v)[0], query, key, value)


def _pulled_back(scale, interpret, pull_back, cotangent):
    with jax.enable_x64(False):
        return *pull_back(cotangent), None


_without_lse.defvjp(_pull_back, _pulled_back)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query, key, value, mask, scale, interpret):
    return _forward(query, key, value, mask, scale, interpret)


def _with_inputs(query, key, value, mask, scale, interpret):
    return _forward(query, key, value, mask, scale, interpret), (query, key, value, mask)


def _gradient(scale, interpret, inputs, cotangents):
    """JAX's kernel has no gradient where it returns the log-sum-exp; the one in plain XLA has."""
    *inputs, mask = inputs
    _, pull_back = jax.vjp(lambda q, k, v: xla_wide.attention(q, k, v, mask, None, scale=scale), *inputs)
    return *pull_back(cotangents), None


_attention.defvjp(_with_inputs, _gradient)
