"""Policies by name, for the command line and configuration files."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.ada_kv import AdaKV
from vlcache_jax.policies.air_cache import AirCache
from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.expected_attention import ExpectedAttention
from vlcache_jax.policies.full_cache import FullCache
from vlcache_jax.policies.generated import as_generated
from vlcache_jax.policies.h2o import H2O
from vlcache_jax.policies.key_difference import KeyDifference
from vlcache_jax.policies.key_norm import KeyNorm
from vlcache_jax.policies.look_m import LookM
from vlcache_jax.policies.method import nearest, options_of
from vlcache_jax.policies.mix_kv import MixKV
from vlcache_jax.policies.prefix_kv import PrefixKV
from vlcache_jax.policies.pyramid_kv import PyramidKV
from vlcache_jax.policies.random_eviction import RandomEviction
from vlcache_jax.policies.snap_kv import SnapKV
from vlcache_jax.policies.streaming_llm import StreamingLLM
from vlcache_jax.policies.tova import TOVA
from vlcache_jax.policies.vl_cache import VLCache
from vlcache_jax.policies.zip_vl import ZipVL

POLICIES: dict[str, Callable[..., Policy]] = {
    "full_cache": FullCache,
    "vl_cache": VLCache,
    "snap_kv": SnapKV,
    "pyramid_kv": PyramidKV,
    "ada_kv": AdaKV,
    "h2o": H2O,
    "tova": TOVA,
    "streaming_llm": StreamingLLM,
    "look_m": LookM,
    "prefix_kv": PrefixKV,
    "zip_vl": ZipVL,
    "air_cache": AirCache,
    "mix_kv": MixKV,
    "expected_attention": ExpectedAttention,
    "key_norm": KeyNorm,
    "key_difference": KeyDifference,
    "random": RandomEviction,
}


def policy_by_name(name: str, **options: Any) -> Policy:
    """Builds a policy from its name and options.

    Args:
      name: a key of `POLICIES`.
      **options: arguments of the policy's function; and `decoding`, for every policy: "append", "window:256" or
        "recompress:128" (for h2o, tova and streaming_llm also "evict"), see `Policy.generated`.

    Returns:
      The policy.

    Raises:
      PolicyError: a name or option that does not exist (with the nearest), or an option out of range.

    Example:
      >>> policy_by_name("vl_cache", budget=0.2).budget
      0.2
    """
    if name not in POLICIES:
        raise PolicyError(f"policy {name!r} does not exist{nearest(name, list(POLICIES))}")
    known = options_of(POLICIES[name])
    rule = None if "decoding" in known or "decoding" not in options else as_generated(options.pop("decoding"))
    for option in options:
        if option not in known:
            raise PolicyError(f"policy {name!r} has no option {option!r}{nearest(option, known)}")
    policy = POLICIES[name](**options)
    return policy if rule is None else dataclasses.replace(policy, generated=rule)
