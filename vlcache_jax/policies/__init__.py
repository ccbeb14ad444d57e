"""Cache policies and their parts. A method of the field is a small file with a function that composes a `Policy`."""

from vlcache_jax.policies.allocate.equal_mass import EqualMass, RetainedMass
from vlcache_jax.policies.allocate.uniform import Allocate, SparsityAware, Uniform
from vlcache_jax.policies.decoding.append import Append
from vlcache_jax.policies.decoding.evict import Evict
from vlcache_jax.policies.decoding.recompress import Recompress
from vlcache_jax.policies.decoding.rolling_window import RollingWindow
from vlcache_jax.policies.decoding.rule import DecodingRule
from vlcache_jax.policies.decoding.va_sparse import VASparse
from vlcache_jax.policies.decoding.var import VAR
from vlcache_jax.policies.evicted.drop import Drop
from vlcache_jax.policies.evicted.merge import Merge
from vlcache_jax.policies.evicted.quantise import Quantise
from vlcache_jax.policies.evicted.rule import Evicted
from vlcache_jax.policies.grammar import policy_by_name
from vlcache_jax.policies.methods.ada_kv import AdaKV, AdaptiveHeads
from vlcache_jax.policies.methods.air_cache import AirCache, EliteAttention, StrengthAndSkewness
from vlcache_jax.policies.methods.compactor import Compactor, LeverageAndAttention
from vlcache_jax.policies.methods.critical_kv import CriticalKV, OutputPerturbation
from vlcache_jax.policies.methods.csp import CSP, CrossSelf
from vlcache_jax.policies.methods.expected_attention import ExpectedAttention, ExpectedScore
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.methods.h2o import H2O
from vlcache_jax.policies.methods.key_difference import KeyDifference, KeyDifferenceScore
from vlcache_jax.policies.methods.key_norm import KeyNorm, KeyNormScore
from vlcache_jax.policies.methods.kv_zip import BestOfAll, KVzip, LargestAttention
from vlcache_jax.policies.methods.lag_kv import LagKV, LagRelative
from vlcache_jax.policies.methods.look_m import LookM, TextPrior
from vlcache_jax.policies.methods.method import METHODS, Method, method
from vlcache_jax.policies.methods.mix_kv import DiversityMixed, MixKV
from vlcache_jax.policies.methods.prefix_kv import PrefixKV
from vlcache_jax.policies.methods.pyramid_kv import Pyramid, PyramidKV
from vlcache_jax.policies.methods.random_eviction import RandomEviction
from vlcache_jax.policies.methods.ranked_bits import RankedBits
from vlcache_jax.policies.methods.snap_kv import SnapKV
from vlcache_jax.policies.methods.sparse_mm import HeadShares, SparseMM
from vlcache_jax.policies.methods.streaming_llm import StreamingLLM
from vlcache_jax.policies.methods.tgv_kv import TGVKV, TextVisionMass, TextWeighted
from vlcache_jax.policies.methods.tova import TOVA
from vlcache_jax.policies.methods.vl_cache import VLCache
from vlcache_jax.policies.methods.zip_vl import EnoughMass, ZipVL
from vlcache_jax.policies.policy import Policy
from vlcache_jax.policies.rows.spans import AllRows, LastRow, LastRows, PostVision, Repetition, Rows
from vlcache_jax.policies.scores.attention import AccumulatedAttention, LayerInputs, RandomScore, Recency, Score
from vlcache_jax.policies.scores.leverage import Leverage
from vlcache_jax.policies.scores.pooling import GridPooled, SequencePooled
from vlcache_jax.policies.scores.visual_sinks import MaskVisualSinks

__all__ = [
    "CSP", "H2O", "METHODS", "TGVKV", "TOVA", "VAR", "AccumulatedAttention", "AdaKV", "AdaptiveHeads", "AirCache",
    "AllRows", "Allocate", "Append", "BestOfAll", "Compactor", "CriticalKV", "CrossSelf", "DecodingRule",
    "DiversityMixed", "Drop", "EliteAttention", "EnoughMass", "EqualMass", "Evict", "Evicted", "ExpectedAttention",
    "ExpectedScore", "FullCache", "GridPooled", "HeadShares", "KVzip", "KeyDifference", "KeyDifferenceScore", "KeyNorm",
    "KeyNormScore", "LagKV", "LagRelative", "LargestAttention", "LastRow", "LastRows", "LayerInputs", "Leverage",
    "LeverageAndAttention", "LookM", "MaskVisualSinks", "Merge", "Method", "MixKV", "OutputPerturbation", "Policy",
    "PostVision", "PrefixKV", "Pyramid", "PyramidKV", "Quantise", "RandomEviction", "RandomScore", "RankedBits",
    "Recency", "Recompress", "Repetition", "RetainedMass", "RollingWindow", "Rows", "Score", "SequencePooled", "SnapKV",
    "SparseMM", "SparsityAware", "StreamingLLM", "StrengthAndSkewness", "TextPrior", "TextVisionMass", "TextWeighted",
    "Uniform", "VASparse", "VLCache", "ZipVL", "method", "policy_by_name",
]  # fmt: skip
