"""What a model, a batch and a prompt need on a TPU slice, from the TPU's own compiler; no TPU is needed."""

from vlcache_jax.planning.plan import Plan, PolicyPlan, plan
from vlcache_jax.planning.programs import Program, Workload
from vlcache_jax.planning.search import Limit

__all__ = ["Limit", "Plan", "PolicyPlan", "Program", "Workload", "plan"]
