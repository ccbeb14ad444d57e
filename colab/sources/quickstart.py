# %% [markdown]
# # A vision-language model with a tenth of its KV cache
#
# This notebook asks a model about a picture twice, with all of its KV cache and with a tenth of it, and shows what
# the two answers cost and which parts of the picture were kept. It runs on a TPU, GPU or CPU runtime (in Colab:
# Runtime > Change runtime type).

# %%
# install

# %%
import time

import jax
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.assets import demo_assets
from vlcache_jax.explain import explain

device = jax.local_devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit", 0)
print(f"vlcache_jax {vlc.__version__}, jax {jax.__version__}")
print(f"{jax.device_count()} x {device.device_kind}, {memory / 2**30:.1f} GiB each" if memory else "no accelerator")

# %% [markdown]
# ## A checkpoint that fits
#
# Without an accelerator, the small model that ships with the package is used: it reads pages made for it. With one, a
# model from the Hugging Face Hub is downloaded, the largest of these that leaves room for the cache:
#
# | memory of the device | such as | checkpoint |
# |---:|---|---|
# | 15 GiB | TPU v5e, T4 | Qwen2.5-VL-3B (7.5 GB in bfloat16) |
# | 30 GiB | TPU v6e, A100 | Qwen2.5-VL-7B (16.6 GB in bfloat16) |
#
# `vlcache-jax plan` asks the TPU's compiler how much a model, a batch and a policy take.

# %% tags=["parameters"]
checkpoint = ""  # another folder, or another id of the Hub
picture = ""  # a path, or "upload" to choose a file in Colab
question = ""
max_new_tokens = 64

# %%
MODELS = [(29e9, "Qwen/Qwen2.5-VL-7B-Instruct"), (14e9, "Qwen/Qwen2.5-VL-3B-Instruct")]
fitting = [name for least, name in MODELS if memory >= least]
demo = not checkpoint and not fitting
if demo:
    vlm = vlc.load(demo_assets(None) / "demo_model", dtype="float32")
else:
    vlm = vlc.load(checkpoint or fitting[0])

# %%
if picture == "upload":
    from google.colab import files

    picture = next(iter(files.upload()))
image = Image.open(picture or demo_assets(None) / "demo_images" / "document_1.png").convert("RGB")
question = question or (
    "Read the value of salary on this page and answer with the name and the number."
    if demo
    else "Read the value of salary on this page."
    if not picture
    else "Describe this picture."
)
image

# %% [markdown]
# ## The same question, with the full cache and with a tenth of it

# %%
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
batch = vlm.processor.chat([[{"role": "user", "content": content}]])


def ask(policy):
    """Answers, and measures the second run: the first one compiles."""
    for _ in range(2):
        begun = time.perf_counter()
        out = jax.block_until_ready(vlc.generate(vlm.model, vlm.params, batch, policy, max_new_tokens=max_new_tokens))
        seconds = time.perf_counter() - begun
    report = out.report
    print(f"{policy.name}: {vlm.processor.decode(out)[0]}")
    print(
        f"    {report.state_bytes / 2**20:.2f} MiB of cache, {report.state_bytes / report.full_bytes:.1%} of all; "
        f"{int(out.lengths[0])} tokens in {seconds:.2f} s\n"
    )
    return out


full = ask(vlc.FullCache())
out = ask(vlc.VLCache(budget=0.1))

# %% [markdown]
# What was kept of the picture, patch by patch and layer by layer:

# %%
context = vlc.compress(vlm.model, vlm.params, batch, vlc.VLCache(budget=0.1))
answer = vlm.processor.decode(out)[0]
kept = explain([image], batch, context, out.report, vlm.processor.layout, question=question, answer=answer)
kept

# %% [markdown]
# ## Other methods
#
# Every method takes the same options; `bits=8` or `bits=4` stores what is kept in fewer bits. `RankedBits` decides
# about the bits by itself: its budget is one of bytes, and 30 % of them hold nearly every token. It is what the
# command line takes if nothing else is named.

# %%
for policy in (
    vlc.RankedBits(),
    vlc.VLCache(budget=0.05, bits=8),
    vlc.SnapKV(budget=0.1, recent=0.1),
    vlc.StreamingLLM(budget=0.1),
):
    ask(policy)

# %% [markdown]
# ## Compress once, ask many
#
# A picture that is compressed before the question is known needs a method that does not look at the question. The
# prompt ends with the picture here, as the demo model's template writes it; for another model write what its template
# does.

# %%
if demo:
    page = vlm.processor(images=[[image]], text=["USER: <image>\n"])
    context = vlc.compress(vlm.model, vlm.params, page, vlc.KeyDifference(budget=0.5))
    ask_for = "Read the value of {} on this page and answer with the name and the number. ASSISTANT:"
    questions = vlm.processor.continuation([[ask_for.format(name) for name in ("salary", "claim", "bonus")]])
    print(vlm.processor.decode(vlc.answer(context, questions, max_new_tokens=16)))

# %% [markdown]
# Next: `evaluation.ipynb` (what a tenth costs on your own data), `own_policy.ipynb` (a method of your own),
# `training.ipynb` (fine-tuning, and rollouts from a compressed cache).
