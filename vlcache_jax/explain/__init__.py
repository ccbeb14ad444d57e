"""Pictures of what was kept."""

from vlcache_jax.explain.pictures import explain, kept_by_layer

__all__ = ["explain", "kept_by_layer"]
