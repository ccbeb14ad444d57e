"""Reading and writing checkpoints in the safetensors layout of transformers."""

from vlcache_jax.models.checkpoint.load import load_params
from vlcache_jax.models.checkpoint.save import save_params

__all__ = ["load_params", "save_params"]
