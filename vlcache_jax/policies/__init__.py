"""Cache policies and their parts. A method of the field is a small file with a function that composes a `Policy`."""

from vlcache_jax.policies.allocate import Allocate, SparsityAware, Uniform
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.by_name import POLICIES, policy_by_name
from vlcache_jax.policies.full_cache import FullCache
from vlcache_jax.policies.random_eviction import RandomEviction
from vlcache_jax.policies.rows import AllRows, LastRow, LastRows, PostVision, Rows
from vlcache_jax.policies.scores import AccumulatedAttention, LayerInputs, RandomScore, Score
from vlcache_jax.policies.vl_cache import VLCache

__all__ = [
    "POLICIES",
    "AccumulatedAttention",
    "AllRows",
    "Allocate",
    "FullCache",
    "LastRow",
    "LastRows",
    "LayerInputs",
    "Policy",
    "PostVision",
    "RandomEviction",
    "RandomScore",
    "Rows",
    "Score",
    "SparsityAware",
    "Uniform",
    "VLCache",
    "policy_by_name",
]
