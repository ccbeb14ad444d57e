# %% [markdown]
# # Fine-tuning, and rollouts from a compressed cache
#
# Two ways to train a loaded model with ordinary JAX: adapters (LoRA) on right answers, and policy gradients on
# answers that the model draws itself with a tenth of its cache. The small model that ships with the package shows
# both; for a model of the Hub change `checkpoint` and the data.

# %%
# install

# %%
import jax
import numpy as np
import optax
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.assets import demo_assets
from vlcache_jax.demo.data.samples import make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.training.examples import make_train_batch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.parts import merge
from vlcache_jax.training.rollouts import Group, advantages, grpo_loss, rollout
from vlcache_jax.training.state import init_state, make_train_step

print(f"vlcache_jax {vlc.__version__}, jax {jax.__version__}, {jax.devices()}")

# %% tags=["parameters"]
checkpoint = ""
steps, rows = 30, 16  # of fine-tuning
rollout_steps, prompts, samples = 8, 8, 8  # of policy gradients
held_out = 32

# %%
vlm = vlc.load(checkpoint or demo_assets(None) / "demo_model", dtype="float32", layout="stacked")


def pages(number, count):
    """Pictures of pages, questions about them, and right answers: "salary 9338"."""
    drawn = [make_sample("documents", 7, number * 1000 + i, max_questions=1) for i in range(count)]
    pictures = [[Image.fromarray(np.asarray(pixels)) for pixels in sample.images] for sample in drawn]
    return pictures, [prompt(sample.questions[0][0]) for sample in drawn], [sample.questions[0][1] for sample in drawn]


def number_of(answer):
    return answer.split()[-1]


# %% [markdown]
# ## Adapters: another way to answer
#
# The model answers with the name and the number. It shall learn to give the number alone. The weights stay as they
# are; the adapters beside them are all that is trained, kept and saved.

# %%
lora = Lora(rank=8, alpha=16)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=0.0))
step = make_train_step(lora.loss(answer_loss(vlm.model)), optimizer)
state = init_state(lora.init(vlm.model, vlm.params), optimizer)
for number in range(steps):
    pictures, questions, answers = pages(number, rows)
    batch = make_train_batch(vlm.processor, pictures, questions, list(map(number_of, answers)), length=320)
    state, metrics = step(state, batch, vlm.params)
    if number % 10 == 0 or number == steps - 1:
        print(f"step {number + 1}: loss {float(metrics['loss']):.3f}")

# %% [markdown]
# What it says now about pages it has not seen, with the full cache and with a tenth of it:

# %%
params = lora.applied(merge(vlm.params, state.params))
pictures, questions, answers = pages(900, held_out)
batch = vlm.processor(images=pictures, text=questions)
for name, policy in (("the full cache", vlc.FullCache()), ("VL-Cache 10 %", vlc.VLCache(budget=0.1))):
    said = vlm.processor.decode(vlc.generate(vlm.model, params, batch, policy, max_new_tokens=10))
    right = np.mean([text == number_of(answer) for text, answer in zip(said, answers, strict=True)])
    print(f"under {name}: {right:.0%} right, such as {said[0]!r}")

# %% [markdown]
# `vlcache_jax.training.adapter_folder.save_adapters` writes them in PEFT's format, `lora.merged` adds them to the
# kernels.
#
# ## Rollouts: answers that are drawn with a tenth of the cache
#
# Eight answers to a prompt are drawn from **one** compressed prefill. What drew them is not quite what is trained,
# the model with its full cache; the difference is known for every token, and importance weights correct for it. A
# right answer gives a reward of 1.
#
# The start is the model with noise on its weights, which reads badly.

# %%
rng = np.random.default_rng(0)


def disturbed(path, x):
    """Noise of 0.7 standard deviations on every kernel."""
    return x + 0.7 * np.std(x) * rng.normal(size=x.shape).astype(x.dtype) if path[-1].key == "kernel" else x


layers = jax.tree_util.tree_map_with_path(disturbed, vlm.params["decoder"]["layers"])
start = vlm.params | {"decoder": vlm.params["decoder"] | {"layers": layers}}

policy = vlc.VLCache(budget=0.1)
lora = Lora(rank=32, alpha=64)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3, b2=0.98))
step = make_train_step(lora.loss(grpo_loss(vlm.model)), optimizer)
state = init_state(lora.init(vlm.model, start), optimizer)
for number in range(rollout_steps):
    pictures, questions, answers = pages(2000 + number, prompts)
    batch = vlm.processor(images=pictures, text=questions)
    out = rollout(
        vlm.model, lora.applied(merge(start, state.params)), batch, policy, 10,
        samples=samples, seeds=1000 * number, full=True,
    )  # fmt: skip
    texts = vlm.processor.decode(out)
    reward = np.array(
        [[text == answer for text in row] for row, answer in zip(texts, answers, strict=True)], np.float32
    )
    state, metrics = step(state, Group(batch, out, advantages(reward)), start)
    print(
        f"step {number + 1}: reward {reward.mean():.2f}; a token's log-probability under the full cache and as it was "
        f"drawn differ by {float(metrics['mismatch']):.3f}"
    )

# %% [markdown]
# `examples/rollouts.py` is the whole of it, with states that a stopped run goes on from, a share of the cache of your
# choice, and the correction on or off. On several devices load with `vlc.load(..., mesh=jax.make_mesh(...))`: nothing
# else changes.
