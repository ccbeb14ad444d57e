"""A model for lmms-eval: `lmms-eval eval --model vlcache_jax --model_args pretrained=DIR,policy=vl_cache:0.1 ...`."""
