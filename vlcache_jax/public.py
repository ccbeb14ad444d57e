"""The public names of `vlcache_jax`: whatever is imported here and in `__all__` is `vlcache_jax.<name>`."""

from typing import TYPE_CHECKING, Any

from vlcache_jax.cache.state import KVState
from vlcache_jax.engine.engine import Engine
from vlcache_jax.engine.requests import Request, Result
from vlcache_jax.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    PlacementWarning,
    PolicyError,
    PolicyWarning,
    VLCacheError,
)
from vlcache_jax.evaluation.evaluate import evaluate
from vlcache_jax.files.compilation_cache import use_compilation_cache
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.context_files import load_context, save_context
from vlcache_jax.inference.decode import decode, stream_decode
from vlcache_jax.inference.decode_step import decode_step
from vlcache_jax.inference.divergence import Divergence, divergence
from vlcache_jax.inference.extend import extend
from vlcache_jax.inference.generate import Generation, answer, generate, stream
from vlcache_jax.inference.loop import DecodingState
from vlcache_jax.inference.prefill import compress, prefill
from vlcache_jax.inference.recipe import Recipe, recipe_by_name
from vlcache_jax.inference.report import Report
from vlcache_jax.inference.row_options import RowOptions
from vlcache_jax.inference.rows import decode_chunk, empty_rows, insert
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inference.score import Scores, score
from vlcache_jax.inputs import Batch, Continuation
from vlcache_jax.models.coding import WeightCoding
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.io.loading import VLM, load
from vlcache_jax.models.io.saving import save
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.patterns.a_shape import AShape
from vlcache_jax.patterns.block_mask import BlockMask
from vlcache_jax.patterns.flex_prefill import FlexPrefill
from vlcache_jax.patterns.m_inference import MInference
from vlcache_jax.patterns.mm_inference import MMInference
from vlcache_jax.patterns.tri_shape import TriShape
from vlcache_jax.patterns.x_attention import XAttention
from vlcache_jax.policies import (
    CSP,
    H2O,
    TGVKV,
    TOVA,
    VAR,
    AdaKV,
    AirCache,
    Append,
    Compactor,
    CriticalKV,
    Drop,
    Evict,
    ExpectedAttention,
    FullCache,
    KeyDifference,
    KeyNorm,
    KVzip,
    LagKV,
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
    RankedBits,
    Recompress,
    RollingWindow,
    SnapKV,
    SparseMM,
    StreamingLLM,
    VASparse,
    VLCache,
    ZipVL,
    policy_by_name,
)
from vlcache_jax.policies.budget import Bytes, ByteShare, Mass, Tokens
from vlcache_jax.policies.shares import layer_budgets
from vlcache_jax.policies.window import Window
from vlcache_jax.pruning.methods.aim import AIM
from vlcache_jax.pruning.methods.cd_pruner import CDPruner
from vlcache_jax.pruning.methods.core_matching import CoreMatching
from vlcache_jax.pruning.methods.div_prune import DivPrune
from vlcache_jax.pruning.methods.fast_v import FastV
from vlcache_jax.pruning.methods.feather import Feather
from vlcache_jax.pruning.methods.keep_curve import KeepCurve, search_keep_curve
from vlcache_jax.pruning.methods.pi_to_me import PiToMe
from vlcache_jax.pruning.methods.pyramid_drop import PyramidDrop
from vlcache_jax.pruning.methods.sparse_vlm import SparseVLM
from vlcache_jax.pruning.methods.todre import ToDRE
from vlcache_jax.pruning.methods.token_correlation import TokenCorrelation
from vlcache_jax.pruning.methods.v_flow_opt import VFlowOpt
from vlcache_jax.pruning.methods.vision_zip import VisionZip

if TYPE_CHECKING:
    from vlcache_jax.planning import plan

__all__ = [
    "AIM", "CSP", "H2O", "TGVKV", "TOVA", "VAR", "VLM", "AShape", "AdaKV", "AirCache", "Append", "Batch", "BlockMask",
    "ByteShare", "Bytes", "CDPruner", "CheckpointError", "Compactor", "Context", "Continuation", "CoreMatching",
    "CriticalKV", "DecodingState", "DivPrune", "Divergence", "Drop", "Engine", "Evict", "ExpectedAttention", "FastV",
    "Feather", "FlexPrefill", "FrameSampling", "FullCache", "Generation", "InputError", "KVState", "KVzip", "KeepCurve",
    "Kernels", "KeyDifference", "KeyNorm", "LagKV", "LastRows", "LookM", "MInference", "MMInference", "Mass", "Merge",
    "MixKV", "NonFiniteError", "PiToMe", "PlacementWarning", "Policy", "PolicyError", "PolicyWarning", "PostVision",
    "PrefixKV", "PyramidDrop", "PyramidKV", "Quantise", "RandomEviction", "RankedBits", "Recipe", "Recompress",
    "Report", "Request", "Result", "RollingWindow", "RowOptions", "Sampling", "Scores", "SnapKV", "SparseMM",
    "SparseVLM", "StreamingLLM", "ToDRE", "TokenCorrelation", "Tokens", "TriShape", "VASparse", "VFlowOpt", "VLCache",
    "VLCacheError", "Video", "VisionZip", "WeightCoding", "Window", "XAttention", "ZipVL", "answer", "compress",
    "decode", "decode_chunk", "decode_step", "divergence", "empty_rows", "evaluate", "extend", "generate", "insert",
    "layer_budgets", "load", "load_context", "plan", "policy_by_name", "prefill", "recipe_by_name", "save",
    "save_context", "score", "search_keep_curve", "stream", "stream_decode", "use_compilation_cache",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "plan":  # imported when it is asked for: few programs plan
        from vlcache_jax.planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
