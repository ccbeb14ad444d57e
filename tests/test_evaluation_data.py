"""The files of samples that `evaluate` reads: JSON lines, VLMEvalKit's TSV, lmms-eval's parquet."""

import base64
import csv
import math

import pyarrow.parquet
import pytest

import vlcache_jax as vlc
from vlcache_jax.evaluation import parquet
from vlcache_jax.evaluation.samples import find_files, read_samples
from vlcache_jax.evaluation.tasks import TASKS


def test_tsv(tmp_path):
    image = base64.b64encode(b"first" * 40).decode()
    rows = [
        {"index": "1", "image": image, "question": "What?", "answer": "['a', 'b']", "A": "", "B": ""},
        {"index": "2", "image": "1", "question": "Two\nlines?", "answer": "B", "A": "cat", "B": "dog"},
        {"index": "3", "image": str([image, image]), "question": "Which?", "answer": "7", "A": "", "B": ""},
    ]
    path = tmp_path / "x.tsv"
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    first, second, third = read_samples(find_files([tmp_path]))
    url = f"data:image/png;base64,{image}"
    assert (first.images, first.answers, first.choices) == ((url,), ("a", "b"), ())
    assert (second.images, second.answers, second.choices) == ((url,), ("B",), ("cat", "dog"))
    assert (third.images, third.question) == ((url, url), "Which?")


def test_parquet(tmp_path):
    """Columns as lmms-eval's DocVQA, MMMU and COCO captions have them."""
    image = {"bytes": b"first" * 40, "path": "1.png"}
    url = f"data:image/png;base64,{base64.b64encode(image['bytes']).decode()}"
    tables = {
        "a": [{"questionId": "7", "question": "What?", "image": image, "answers": ["a", "b"], "docId": 5}] * 1,
        "b": [
            {
                "id": "m1",
                "question": "<image 1>?",
                "options": "['x', 'y']",
                "answer": "B",
                "image_1": image,
                "image_2": None,
            },
            {"id": "m2", "question": "Or?", "options": "[]", "answer": "3", "image_1": image, "image_2": image},
        ],
        "c": [{"image": image, "answer": ["one caption", "another"]}],
        "d": [
            {
                "pid": pid,
                "question": "How long?",
                "image": "images/9.jpg",
                "decoded_image": image,
                "unit": "cm",
                "precision": precision,
                "answer": "1.4",
                "answer_type": "float",
            }
            for pid, precision in (("9", 1.0), ("10", math.nan))
        ],
    }
    for name, lines_of_one in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines_of_one), tmp_path / f"{name}.parquet")
    docvqa, first, second, caption, how_long, no_precision = read_samples(find_files([tmp_path]))
    assert (docvqa.id, docvqa.images, docvqa.answers, docvqa.more) == ("7", (url,), ("a", "b"), {"docId": 5})
    assert (first.images, first.choices, first.answers) == ((url,), ("x", "y"), ("B",))
    assert (second.images, second.choices) == ((url, url), ())
    assert (how_long.id, how_long.images) == ("9", (url,))
    assert how_long.more == {"unit": "cm", "precision": 1.0, "answer_type": "float"}
    assert "precision" not in no_precision.more  # JSON has no NaN
    hint = "(Unit: cm)\nAnswer the question using a single floating-point number with one decimal place."
    assert all(TASKS["mathvista"].prompt(sample).endswith(hint) for sample in (how_long, no_precision))
    assert (caption.id, caption.question, caption.answers) == ("c-1", "", ("one caption", "another"))


def test_files_of_several_layouts(tmp_path):
    """They are read one after another; the same data in two of them is refused."""
    (tmp_path / "a.jsonl").write_text('{"id": "1", "question": "a?"}\n')
    (tmp_path / "b.tsv").write_text("index\tquestion\timage\tanswer\n2\tb?\t\tB\n")
    assert [sample.question for sample in read_samples(find_files([tmp_path]))] == ["a?", "b?"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 2, "question": "b?"}]), tmp_path / "c.parquet")
    with pytest.raises(vlc.InputError, match=r"c.parquet: the id .2. comes twice, also in .*b.tsv"):
        list(read_samples(find_files([tmp_path])))


def test_parquet_that_is_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BOMB", 2**20)
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "label": [1]}), path)
    with pytest.raises(vlc.InputError, match=r"as lmms-eval's layouts have; its columns are: prompt, label"):
        list(read_samples([path]))
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a" * 2**23]}), path, compression="zstd")
    with pytest.raises(vlc.InputError, match=r"x.parquet: [\d,]* bytes become 8,388,"):
        list(read_samples([path]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(vlc.InputError, match=r"x.parquet is no parquet file"):
        list(read_samples([path]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "{\n", "x.jsonl, line 1.*one JSON object a line"),
        ("x.jsonl", "[1]\n", "expected a JSON object"),
        ("x.jsonl", '{"id": 1}\n', "expected a question"),
        ("x.jsonl", '{"question": "a", "images": [[1]]}\n', "images=.*list of texts"),
        ("x.jsonl", '{"question": "a", "max_new_tokens": 0}\n', "max_new_tokens=0"),
        ("x.jsonl", '{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}\n', "the id .1. comes twice"),
        ("x.tsv", "index\timage\n1\tx\n", "no column question.*its columns are: index, image"),
        ("x.csv", "question\n", "is none of .jsonl, .tsv"),
        ("x.parquet", "question\n", "x.parquet is no parquet file that can be read"),
    ],
)
def test_bad_data(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(vlc.InputError, match=message):
        list(read_samples(find_files([tmp_path / name])))
