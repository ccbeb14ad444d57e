"""Codes of weights back to floats, on the host: what is saved of a model whose weights are codes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlcache_jax.files.safetensors import to_host
from vlcache_jax.models.coding import CODED


def float_params(params: Mapping[str, Any], dtype: Any, path: str = "") -> dict[str, Any]:
    """Parameters, those of stacked layers included, with a kernel of NumPy's in the place of codes.

    Args:
      params: a nested dict.
      dtype: of the kernels: each is (codes - zeros) * scales, rounded once.
      path: of the dict.

    Raises:
      InputError: codes that lie on devices of other processes, too.
    """
    new = {
        name: float_params(value, dtype, f"{path}{name}/") if isinstance(value, Mapping) else value
        for name, value in params.items()
        if name not in CODED
    }
    if "codes" in params:
        tables = {name: to_host(path + name, params[name]) for name in CODED if name in params}
        new["kernel"] = _kernel(dtype=dtype, **tables)
    return new


def _kernel(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, dtype: Any) -> np.ndarray:
    """[..., channels, features] from codes of this shape, and scales and zeros [..., groups, features]."""
    kernel = np.empty(codes.shape, dtype)
    for at in np.ndindex(codes.shape[:-2]):  # a layer's floats at a time
        floats = codes[at].astype(np.float32).reshape(*scales.shape[-2:-1], -1, codes.shape[-1])
        if zeros is not None:
            floats -= zeros[at][:, None]
        kernel[at] = (floats * scales[at][:, None]).reshape(codes.shape[-2:]).astype(dtype)
    return kernel
