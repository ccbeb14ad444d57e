# %% [markdown]
# # A cache policy of your own
#
# What to keep of a prompt is decided by small parts: which rows *score* the keys, what a key is *worth*, and how many
# each layer *keeps*. This notebook writes two of them, in 30 lines, and compares the method with VL-Cache on
# documents whose right answers are known. Everything runs on a CPU in about a minute.

# %%
# install

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.demo.assets import demo_assets
from vlcache_jax.demo.data.samples import make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.policies import AccumulatedAttention, Allocate, PostVision, Score, method
from vlcache_jax.policies.shares import share_slots

vlm = vlc.load(demo_assets(None) / "demo_model", dtype="float32")

# %% tags=["parameters"]
samples = 32
budgets = [0.05]

# %% [markdown]
# ## A score: what a token is worth
#
# A score is a function of what a layer computed: queries, keys, values, and the attention of the policy's rows. It
# returns a number for each token and KV head; the highest are kept. This one multiplies the question's attention with
# the size of what it fetches, so that tokens that are looked at but say nothing (attention sinks) are worth less.


# %%
@dataclasses.dataclass(frozen=True)
class AttentionTimesValue(Score):
    def __call__(self, inputs):
        attention = AccumulatedAttention()(inputs)  # [batch, kv_heads, length]
        size = jnp.linalg.norm(inputs.value.astype(jnp.float32), axis=-1)  # [batch, length, kv_heads]
        return attention * size.swapaxes(1, 2)


# %% [markdown]
# ## An allocation: how many tokens a layer keeps
#
# `measure` says of each layer what must be known of it, `slots` shares the budget out. This one gives more to layers
# whose score is spread over more tokens.


# %%
@dataclasses.dataclass(frozen=True)
class BySpread(Allocate):
    def measure(self, inputs, scores):
        share = jnp.where(inputs.valid, scores.mean(axis=1), 0)  # padding may hold anything: mask it before a sum
        share = share / share.sum(axis=1, keepdims=True)
        return 1 / (share**2).sum(axis=1)  # [batch]: 1 if all lies on one token, n if it is spread evenly over n

    def slots(self, measured, lengths, budget):  # measured [batch, layers]
        return jax.vmap(share_slots)(measured, budget.total(lengths), jnp.ones_like(lengths), lengths)


# %% [markdown]
# ## A method: the parts together
#
# `@method` makes it known by name: for `vlc.policy_by_name`, `vlcache-jax evaluate` in the same process, and
# pictures.


# %%
@method("value_aware", title="Attention times value")
def ValueAware(budget=0.1, spread=True):
    parts = {"allocate": BySpread()} if spread else {}
    return vlc.Policy(
        name="value_aware", budget=budget, rows=PostVision(), score=AttentionTimesValue(), recent=0.1, **parts
    )


# %% [markdown]
# ## Does it help?
#
# Documents that the model has not seen, each with a question about one of its lines.

# %%
drawn = [make_sample("documents", 7, index, max_questions=1) for index in range(samples)]
batch = vlm.processor(
    images=[list(sample.images) for sample in drawn],
    text=[prompt(sample.questions[0][0], len(sample.images)) for sample in drawn],
)
answers = [sample.questions[0][1] for sample in drawn]

print(f"{'policy':34}{'right':>8}{'bytes':>8}   slots of each layer, first document")
for name in ("full_cache", *(f"{kind}:{b}" for b in budgets for kind in ("vl_cache", "value_aware", "random"))):
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.policy_by_name(name), max_new_tokens=12)
    right = np.mean([said == answer for said, answer in zip(vlm.processor.decode(out), answers, strict=True)])
    share = out.report.state_bytes / out.report.full_bytes
    print(f"{name:34}{right:>8.0%}{share:>8.1%}   {np.asarray(out.report.kept[0]).tolist()}")

# %% [markdown]
# The page [A method of your own](../docs/own_method.md) lists all that parts are given and what they must hold to. A
# new method gets every promise of the library for free: fixed shapes, rows of a batch that do not see each other, any
# mesh, quantised stores, merging of what is evicted.
