"""Patterns as they are typed: `pattern[:value][,option=value]...`."""

import vlcache_jax.patterns.a_shape
import vlcache_jax.patterns.flex_prefill
import vlcache_jax.patterns.m_inference
import vlcache_jax.patterns.mm_inference
import vlcache_jax.patterns.tri_shape
import vlcache_jax.patterns.x_attention  # noqa: F401  (the patterns make themselves known)
from vlcache_jax.patterns.pattern import PATTERNS, Pattern
from vlcache_jax.terminal.options import instance


def pattern_by_name(text: str) -> Pattern:
    """The pattern of a sparse prefill that a text names.

    Args:
      text: a pattern's name, then, behind a colon, the value of its first option, and behind commas others, where its
        own are not wanted. Several numbers of one option have "/" between them: "a_shape:128,window=2048",
        "x_attention:0.9,stride=16,dense_layers=0/1", "m_inference:heads.json".

    Raises:
      PolicyError: a name or option that does not exist, with the nearest, one that is given twice, or a value that is
        none.

    Example:
      >>> from vlcache_jax.patterns.a_shape import AShape
      >>> pattern_by_name("a_shape:64,window=512,min_tokens=0") == AShape(64, 512, min_tokens=0)
      True
    """
    return instance(text, PATTERNS, "prefill pattern", "min_tokens=8192")
