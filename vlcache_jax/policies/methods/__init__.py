"""A file for each method. Those imported here are known by name, in this order."""
# ruff: noqa: F401, I001

import vlcache_jax.policies.methods.full_cache
import vlcache_jax.policies.methods.vl_cache
import vlcache_jax.policies.methods.snap_kv
import vlcache_jax.policies.methods.pyramid_kv
import vlcache_jax.policies.methods.ada_kv
import vlcache_jax.policies.methods.h2o
import vlcache_jax.policies.methods.tova
import vlcache_jax.policies.methods.streaming_llm
import vlcache_jax.policies.methods.look_m
import vlcache_jax.policies.methods.prefix_kv
import vlcache_jax.policies.methods.zip_vl
import vlcache_jax.policies.methods.ranked_bits
import vlcache_jax.policies.methods.air_cache
import vlcache_jax.policies.methods.mix_kv
import vlcache_jax.policies.methods.tgv_kv
import vlcache_jax.policies.methods.csp
import vlcache_jax.policies.methods.critical_kv
import vlcache_jax.policies.methods.sparse_mm
import vlcache_jax.policies.methods.expected_attention
import vlcache_jax.policies.methods.kv_zip
import vlcache_jax.policies.methods.compactor
import vlcache_jax.policies.methods.lag_kv
import vlcache_jax.policies.methods.key_norm
import vlcache_jax.policies.methods.key_difference
import vlcache_jax.policies.methods.random_eviction
