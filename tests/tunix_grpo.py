"""A run of tunix's GRPO learner: answers shall be full of fours. Prints ten rewards, and how far rollouts lag."""

import functools
import sys

import jax
import numpy as np
import optax
from flax import nnx
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

import vlcache_jax as vlc
from vlcache_jax.training.tunix_rollout import Actor, Rollout, Words

STEPS = 10

vlm = vlc.load(sys.argv[1], dtype="float32", layout="stacked")
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
cluster = RLCluster(
    actor=Actor(vlm),
    reference=Actor(vlm),
    tokenizer=Words(vlm),
    cluster_config=ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        rollout_engine=functools.partial(Rollout, policy=vlc.VLCache(0.5)),
        training_config=RLTrainingConfig(actor_optimizer=optax.adam(3e-3), eval_every_n_steps=1000, max_steps=STEPS),
        rollout_config=RolloutConfig(max_tokens_to_generate=6, max_prompt_length=32, temperature=1.0),
    ),
)
rewards = []


def reward(prompts, completions, **_):
    found = [text.count("4") / 6 for text in completions]
    rewards.append(np.mean(found))
    return found


learner = GRPOLearner(cluster, GRPOConfig(num_generations=8, num_iterations=1, beta=0.0), reward)
learner.train([{"prompts": np.array(["USER: Read the value of salary", "USER: Where do you see it?"])}] * STEPS)
trained, drawing = (nnx.state(x, nnx.Param) for x in (cluster.actor_trainer.model, cluster.rollout.model()))
apart = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max()), trained, drawing)
print(*np.round(rewards, 3), max(jax.tree.leaves(apart)))
