"""Cache policies and their parts. A method of the field is a small file with a function that composes a `Policy`."""

from vlcache_jax.policies.ada_kv import AdaKV, AdaptiveHeads
from vlcache_jax.policies.air_cache import AirCache, EliteAttention, StrengthAndSkewness
from vlcache_jax.policies.allocate import Allocate, SparsityAware, Uniform
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.by_name import POLICIES, policy_by_name
from vlcache_jax.policies.equal_mass import EqualMass, RetainedMass
from vlcache_jax.policies.evicted import Drop, Evicted, Merge, Quantise
from vlcache_jax.policies.expected_attention import ExpectedAttention, ExpectedScore
from vlcache_jax.policies.full_cache import FullCache
from vlcache_jax.policies.h2o import H2O
from vlcache_jax.policies.key_difference import KeyDifference, KeyDifferenceScore
from vlcache_jax.policies.key_norm import KeyNorm, KeyNormScore
from vlcache_jax.policies.look_m import LookM, TextPrior
from vlcache_jax.policies.mix_kv import DiversityMixed, MixKV
from vlcache_jax.policies.pooling import GridPooled, SequencePooled
from vlcache_jax.policies.prefix_kv import PrefixKV
from vlcache_jax.policies.pyramid_kv import Pyramid, PyramidKV
from vlcache_jax.policies.random_eviction import RandomEviction
from vlcache_jax.policies.rows import AllRows, LastRow, LastRows, PostVision, Rows
from vlcache_jax.policies.scores import AccumulatedAttention, LayerInputs, RandomScore, Recency, Score
from vlcache_jax.policies.snap_kv import SnapKV
from vlcache_jax.policies.streaming_llm import StreamingLLM
from vlcache_jax.policies.tova import TOVA
from vlcache_jax.policies.visual_sinks import MaskVisualSinks
from vlcache_jax.policies.vl_cache import VLCache
from vlcache_jax.policies.zip_vl import EnoughMass, ZipVL

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "AccumulatedAttention",
    "AdaKV",
    "AdaptiveHeads",
    "AirCache",
    "AllRows",
    "Allocate",
    "DiversityMixed",
    "Drop",
    "EliteAttention",
    "EnoughMass",
    "EqualMass",
    "Evicted",
    "ExpectedAttention",
    "ExpectedScore",
    "FullCache",
    "GridPooled",
    "KeyDifference",
    "KeyDifferenceScore",
    "KeyNorm",
    "KeyNormScore",
    "LastRow",
    "LastRows",
    "LayerInputs",
    "LookM",
    "MaskVisualSinks",
    "Merge",
    "MixKV",
    "Policy",
    "PostVision",
    "PrefixKV",
    "Pyramid",
    "PyramidKV",
    "Quantise",
    "RandomEviction",
    "RandomScore",
    "Recency",
    "RetainedMass",
    "Rows",
    "Score",
    "SequencePooled",
    "SnapKV",
    "SparsityAware",
    "StreamingLLM",
    "StrengthAndSkewness",
    "TextPrior",
    "Uniform",
    "VLCache",
    "ZipVL",
    "policy_by_name",
]
