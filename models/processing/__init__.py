"""Input processing: images and text to a `vlcache_jax.inputs.Batch`."""

from vlcache_jax.models.processing.processor import Processor

__all__ = ["Processor"]
