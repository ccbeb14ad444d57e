"""Policies by name, for the command line and configuration files."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vlcache_jax.errors import PolicyError
from vlcache_jax.policies.decoding.rules import as_generated
from vlcache_jax.policies.methods.ada_kv import AdaKV
from vlcache_jax.policies.methods.air_cache import AirCache
from vlcache_jax.policies.methods.expected_attention import ExpectedAttention
from vlcache_jax.policies.methods.full_cache import FullCache
from vlcache_jax.policies.methods.h2o import H2O
from vlcache_jax.policies.methods.key_difference import KeyDifference
from vlcache_jax.policies.methods.key_norm import KeyNorm
from vlcache_jax.policies.methods.look_m import LookM
from vlcache_jax.policies.methods.method import nearest, options_of
from vlcache_jax.policies.methods.mix_kv import MixKV
from vlcache_jax.policies.methods.prefix_kv import PrefixKV
from vlcache_jax.policies.methods.pyramid_kv import PyramidKV
from vlcache_jax.policies.methods.random_eviction import RandomEviction
from vlcache_jax.policies.methods.snap_kv import SnapKV
from vlcache_jax.policies.methods.streaming_llm import StreamingLLM
from vlcache_jax.policies.methods.tova import TOVA
from vlcache_jax.policies.methods.vl_cache import VLCache
from vlcache_jax.policies.methods.zip_vl import ZipVL
from vlcache_jax.policies.policy import Policy

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
