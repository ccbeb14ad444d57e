"""Vision-language models in JAX/Flax with a compressed, fixed-shape KV cache."""

from typing import TYPE_CHECKING, Any

from vlcache_jax.batch import Batch
from vlcache_jax.budgets import Bytes, Tokens, layer_budgets
from vlcache_jax.decoding import decode_step
from vlcache_jax.errors import CheckpointError, InputError, PolicyError, VLCacheError
from vlcache_jax.generation import Generation, decode, generate, stream, stream_decode
from vlcache_jax.loading import VLM, load
from vlcache_jax.ops import Kernels
from vlcache_jax.policies import (
    H2O,
    TOVA,
    AirCache,
    Append,
    Evict,
    ExpectedAttention,
    FullCache,
    KeyDifference,
    KeyNorm,
    LastRows,
    LookM,
    MixKV,
    Policy,
    PostVision,
    PrefixKV,
    PyramidKV,
    RandomEviction,
    Recompress,
    RollingWindow,
    SnapKV,
    StreamingLLM,
    VLCache,
    policy_by_name,
)
from vlcache_jax.prefill import prefill
from vlcache_jax.report import Report
from vlcache_jax.sampling import Sampling
from vlcache_jax.state import KVState

if TYPE_CHECKING:
    from vlcache_jax.planning import plan

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "TOVA",
    "VLM",
    "AirCache",
    "Append",
    "Batch",
    "Bytes",
    "CheckpointError",
    "Evict",
    "ExpectedAttention",
    "FullCache",
    "Generation",
    "InputError",
    "KVState",
    "Kernels",
    "KeyDifference",
    "KeyNorm",
    "LastRows",
    "LookM",
    "MixKV",
    "Policy",
    "PolicyError",
    "PostVision",
    "PrefixKV",
    "PyramidKV",
    "RandomEviction",
    "Recompress",
    "Report",
    "RollingWindow",
    "Sampling",
    "SnapKV",
    "StreamingLLM",
    "Tokens",
    "VLCache",
    "VLCacheError",
    "decode",
    "decode_step",
    "generate",
    "layer_budgets",
    "load",
    "plan",
    "policy_by_name",
    "prefill",
    "stream",
    "stream_decode",
]


def __getattr__(name: str) -> Any:
    if name == "plan":  # imported when it is asked for: few programs plan
        from vlcache_jax.planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
