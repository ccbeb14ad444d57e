"""A file for each method. Those imported here are known by name, in this order."""
# ruff: noqa: F401, I001

import vlcache_jax.pruning.methods.pyramid_drop
import vlcache_jax.pruning.methods.fast_v
import vlcache_jax.pruning.methods.feather
import vlcache_jax.pruning.methods.vision_zip
import vlcache_jax.pruning.methods.cd_pruner
import vlcache_jax.pruning.methods.div_prune
import vlcache_jax.pruning.methods.todre
import vlcache_jax.pruning.methods.pi_to_me
import vlcache_jax.pruning.methods.aim
import vlcache_jax.pruning.methods.sparse_vlm
import vlcache_jax.pruning.methods.keep_curve
import vlcache_jax.pruning.methods.token_correlation
import vlcache_jax.pruning.methods.core_matching
import vlcache_jax.pruning.methods.v_flow_opt
