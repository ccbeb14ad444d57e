"""A task of lmms-eval in a folder: documents of the demo, answered and as multiple choice; and a script that compares.

python tests/lmms_task.py FOLDER COUNT        writes the tasks `demo_pages` and `demo_choices`
"""

import json
import sys
from pathlib import Path

from PIL import Image

from vlcache_jax.demo.data.samples import HELD_OUT_SEED, make_sample

_UTILS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def choices(doc):
    return doc["choices"]
"""
_PAGES = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
task: demo_pages
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
_CHOICES = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
task: demo_choices
output_type: multiple_choice
target_delimiter: ""
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: gold
doc_to_choice: !function utils.choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(folder: Path, count: int) -> None:
    """Writes `count` pages, a question about each, its right answer, and two wrong ones."""
    lines = []
    for index in range(count):
        sample = make_sample("documents", HELD_OUT_SEED, index)
        path = folder / f"{index}.png"
        Image.fromarray(sample.images[0]).save(path)
        (question, answer), *_ = sample.questions
        name, _, value = answer.rpartition(" ")
        wrong = [f"{name} {(int(value) + step) % 10_000:04d}" for step in (1234, 4321)]
        gold = index % 3
        choices = [*wrong[:gold], answer, *wrong[gold:]]
        lines.append({"image": str(path), "question": question, "answer": answer, "choices": choices, "gold": gold})
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "utils.py").write_text(_UTILS)
    (folder / "demo_pages.yaml").write_text(_PAGES.format(folder=folder))
    (folder / "demo_choices.yaml").write_text(_CHOICES.format(folder=folder))


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
