"""The public names of `vlcache_jax`: whatever is imported here and in `__all__` is `vlcache_jax.<name>`."""

from typing import TYPE_CHECKING, Any

from vlcache_jax.batch import Batch, Continuation
from vlcache_jax.budgets import Bytes, Mass, Tokens, layer_budgets
from vlcache_jax.compilation_cache import use_compilation_cache
from vlcache_jax.context import Context, answer, compress, extend
from vlcache_jax.context_files import load_context, save_context
from vlcache_jax.decoding import decode_step
from vlcache_jax.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    PlacementWarning,
    PolicyError,
    PolicyWarning,
    VLCacheError,
)
from vlcache_jax.generation import Generation, decode, generate, stream, stream_decode
from vlcache_jax.loading import VLM, load
from vlcache_jax.ops import Kernels
from vlcache_jax.policies import (
    H2O,
    TOVA,
    AdaKV,
    AirCache,
    Append,
    Drop,
    Evict,
    ExpectedAttention,
    FullCache,
    KeyDifference,
    KeyNorm,
    LastRows,
    LookM,
    Merge,
    MixKV,
    Policy,
    PostVision,
    PrefixKV,
    PyramidKV,
    Quantise,
    RandomEviction,
    Recompress,
    RollingWindow,
    SnapKV,
    StreamingLLM,
    VLCache,
    ZipVL,
    policy_by_name,
)
from vlcache_jax.prefilling import prefill
from vlcache_jax.report import Report
from vlcache_jax.sampling import Sampling
from vlcache_jax.saving import save
from vlcache_jax.selection import Window
from vlcache_jax.state import KVState

if TYPE_CHECKING:
    from vlcache_jax.planning import plan

__all__ = [
    "H2O",
    "TOVA",
    "VLM",
    "AdaKV",
    "AirCache",
    "Append",
    "Batch",
    "Bytes",
    "CheckpointError",
    "Context",
    "Continuation",
    "Drop",
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
    "Mass",
    "Merge",
    "MixKV",
    "NonFiniteError",
    "PlacementWarning",
    "Policy",
    "PolicyError",
    "PolicyWarning",
    "PostVision",
    "PrefixKV",
    "PyramidKV",
    "Quantise",
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
    "Window",
    "ZipVL",
    "answer",
    "compress",
    "decode",
    "decode_step",
    "extend",
    "generate",
    "layer_budgets",
    "load",
    "load_context",
    "plan",
    "policy_by_name",
    "prefill",
    "save",
    "save_context",
    "stream",
    "stream_decode",
    "use_compilation_cache",
]


def __getattr__(name: str) -> Any:
    if name == "plan":  # imported when it is asked for: few programs plan
        from vlcache_jax.planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
