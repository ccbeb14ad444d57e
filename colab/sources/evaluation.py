# %% [markdown]
# # What does a tenth of the cache cost on your data?
#
# One call answers every sample of a data set under several policies, scores the answers and compares the policies
# sample by sample. It can be stopped at any time: run it again, and it goes on where it was.

# %%
# install

# %%
import json
import pathlib

import jax
import numpy as np
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.assets import demo_assets
from vlcache_jax.demo.data.samples import make_sample
from vlcache_jax.evaluation.report import rows
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import markdown

print(f"vlcache_jax {vlc.__version__}, jax {jax.__version__}, {jax.devices()}")

# %% [markdown]
# ## The data
#
# JSON lines, VLMEvalKit's TSV, or lmms-eval's parquet files (`pip install pyarrow`). Give the path of yours as
# `data`, its task as `task` ("docvqa", "chartqa", "textvqa", "mmmu", ...), and a checkpoint of the Hub. Without them,
# documents and prices are drawn for the small model that ships with the package.

# %% tags=["parameters"]
data, task, checkpoint = "", "jsonl", ""
samples = 32
policies = ["vl_cache:0.1", "snap_kv:0.1", "h2o:0.1"]
folder = "evaluation"

# %%
if not data:
    path = pathlib.Path(folder)
    path.mkdir(exist_ok=True)
    lines = []
    for index in range(samples):
        sample = make_sample(("documents", "prices")[index % 2], 7, index, max_questions=1)
        names = [f"{index}_{number}.png" for number in range(len(sample.images))]
        for name, pixels in zip(names, sample.images, strict=True):
            Image.fromarray(np.asarray(pixels)).save(path / name)
        question, answer = sample.questions[0]
        lines.append({"id": index, "images": names, "question": question, "answers": [answer]})
    data = path / "samples.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")

vlm = vlc.load(checkpoint) if checkpoint else vlc.load(demo_assets(None) / "demo_model", dtype="float32")

# %% [markdown]
# ## All samples, all policies
#
# The engine keeps one batch of answers running and fills a row anew as soon as its answer has ended; the pictures of
# the next samples are read meanwhile. Each answer is a line in the folder as soon as it is there.

# %%
summaries = vlc.evaluate(
    vlm,
    data,
    policies,
    f"{folder}/run",
    task=task,
    compare="full_cache",
    max_new_tokens=16,
    rows=8,
    progress=Progress(),
)

# %%
try:
    from IPython.display import Markdown, display

    display(Markdown(markdown(rows(summaries))))
except ImportError:
    print(markdown(rows(summaries)))

# %% [markdown]
# The last columns compare the same samples: their interval is far narrower than those of the means, and "equal" needs
# no right answers at all. Where the answers differ:

# %%
full, kept = (
    {
        line["id"]: line
        for line in map(json.loads, pathlib.Path(folder, "run", f"{name}.jsonl").read_text().splitlines())
    }
    for name in ("full_cache", "h2o-0.1")
)
different = [name for name in full if full[name]["answer"] != kept.get(name, full[name])["answer"]]
for name in different[:5]:
    print(f"sample {name}: {full[name]['answer']!r} with all of the cache, {kept[name]['answer']!r} with H2O's tenth")

# %% [markdown]
# The same from a shell, with plots and resumable after any stop:
#
#     vlcache-jax evaluate --model DIR_OR_HUB_ID --data docvqa.parquet --task docvqa \
#         --policy vl_cache:0.1 --compare full_cache --out run
#     vlcache-jax report run --compare full_cache
