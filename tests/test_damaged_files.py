"""Files of studies and of training that a disk, an editor or a killed run damaged: named errors, and no other."""

import json
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlcache_jax.demo.assets import read_questions
from vlcache_jax.demo.recipe.train import _check_reached
from vlcache_jax.demo.study.heat_maps import kept_tokens
from vlcache_jax.demo.study.results import FILE, ResultFile
from vlcache_jax.demo.study.summary import Table, tables
from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.tensor_files import Kind, write_tensor_file
from vlcache_jax.training.checkpoint import load_state, save_state
from vlcache_jax.training.loop import ProgressLog

STUDY = {"model": "llava", "samples": 2}
SHARED = {
    "state_bytes": 10,
    "full_bytes": 20,
    "seconds": 1.5,
    "layers": [1.0, 0.5, 0.25],
    "density": [1.0, 1.0, 0.1],
    "exact": "10",
    "agrees": "11",
    "score": [100, 75],
    "mass": 50,
    "hits": [None, 50],
    "kept": 10000,
}
LINES = [
    {"kind": "study", **STUDY},
    {"kind": "run", "date": "2026-11-21", "versions": {"jax": "0.10.2"}},
    {"kind": "result", "task": "scenes", "method": "full_cache", "budget": 1.0, "mode": "known", **SHARED},
    {"kind": "result", "task": "scenes", "method": "vl_cache", "budget": 0.1, "mode": "known", **SHARED},
    {"kind": "kept", "task": "scenes", "method": "vl_cache", "budget": 0.1, "layers": ["09" * 128] * 3,
     "text": [1.0, 2, 3], "answer": "a ring"},
]  # fmt: skip
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


def write(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(data if isinstance(data, bytes) else data.encode())


def test_the_file_that_is_damaged_below_is_whole(tmp_path):
    write(tmp_path, TEXT)
    file = ResultFile(tmp_path, STUDY)
    assert len(file.results) == 2
    assert len(file.kept) == len(file.runs) == 1
    assert "VL-Cache" in tables(Table(file))
    shipped = Path(__file__).parent.parent / "docs" / "fidelity" / FILE
    write(tmp_path, shipped.read_bytes())
    assert len(ResultFile(tmp_path, {"samples": 300}).results) == 1096


def with_line(number, **values):
    """The lines, with some values of line `number` (from 1 on) changed; those that are ... are left out."""
    line = {name: value for name, value in (LINES[number - 1] | values).items() if value is not ...}
    return "".join(json.dumps(x) + "\n" for x in [*LINES[: number - 1], line, *LINES[number:]])


WRONG = (None, True, "x", "", [], [1], {}, {"a": 1}, -1, 1e300, 2**70, 10**400, float("nan"), float("inf"), "\ud800")


@pytest.mark.parametrize("number", [3, 4, 5])
def test_wrong_values_are_named_with_their_line(number, tmp_path):
    for name in LINES[number - 1]:
        for value in (..., *WRONG):
            if value is None and name in ("mass", "hits", "score", "kept"):
                continue
            if (name == "answer" and value in ("x", "")) or (name == "text" and value in ([], [1])):
                continue
            if name in ("task", "method", "mode") and value == "x":
                continue
            if name in ("budget", "seconds", "state_bytes", "full_bytes") and value == 10**400:
                value = 10**41
            write(tmp_path, with_line(number, **{name: value}))
            with pytest.raises(
                InputError, match=rf"results.jsonl, line {number} is no result.*remove the line"
            ) as error:
                ResultFile(tmp_path, STUDY)
            assert name in str(error.value) or value in ("\ud800",) or value is ...


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_line(3, exact="101"), "line 3 .* exact has 3 digits for 2 samples"),
        (with_line(3, score=[100]), "line 3 .* score has 1 numbers for 2 samples"),
        (with_line(4, layers=[1.0], density=[1.0]), "line 4 .* has 1 layers, those before it have 3"),
        (with_line(4, density=[1.0]), "line 4 .* layers has 3 numbers, density 1"),
        (with_line(5, layers=["01", "1", "11"]), "line 5 .* equally long"),
        (TEXT + json.dumps(LINES[3]) + "\n", "line 6 .* repeats line 4, scenes, vl_cache, 0.1, known"),
        (TEXT + json.dumps(LINES[0]) + "\n", "line 6 .* says what is measured"),
        (TEXT.partition("\n")[2], "line 1 .* must say what is measured"),
        (TEXT + "\n", "line 6 "),
        (TEXT.replace("\n", "\n\n", 1), "line 2 "),
        (TEXT + "[1, 2]\n", r"line 6 .* \[1, 2\], not an object"),
        (TEXT + '{"kind":"results"}\n', "line 6 .* its kind is"),
        (TEXT + '{"kind":"run"\n', "line 6 "),
        (TEXT + '{"kind":"run","a":NaN}\n', "line 6 .* nan"),
        (TEXT + '{"kind":"run","a":1,"a":2}\n', "line 6 .* occurs twice"),
        (TEXT + '{"kind":"run","a":1' + "0" * 400 + "}\n", "line 6 .* digits"),
        (TEXT + '{"kind":"run","a":' + "[" * 100_000 + "\n", "line 6 .* deep"),
        (TEXT + '{"kind":"run","a":"' + "x" * (40 << 20) + '"}\n', "line 6 .* bytes, more than"),
        (TEXT.encode() + b'{"kind":"run","a":"\xff"}\n', "line 6 .*utf-8"),
        (TEXT.encode() + b"\0" * 512, "line 6 .* begins with"),
        ("my own notes, without a line break", "line 1 .* begins with"),
        ("my own notes\n", "line 1 "),
    ],
)
def test_damaged_lines_are_named(text, message, tmp_path):
    write(tmp_path, text)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InputError, match=message):
        ResultFile(tmp_path, STUDY)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_picture_of_other_tokens_is_refused():
    line = LINES[4] | {"layers": ["0" * 255] * 3}
    with pytest.raises(InputError, match="vl_cache kept of scenes is noted for 255 visual tokens, the sample has 256"):
        kept_tokens("scenes", 0.1, {"vl_cache": line})


def test_another_study_is_not_cut(tmp_path):
    write(tmp_path, TEXT + '{"kind":"resu')
    with pytest.raises(InputError, match="samples=2, not 3"):
        ResultFile(tmp_path, {**STUDY, "samples": 3})
    assert (tmp_path / FILE).read_text() == TEXT + '{"kind":"resu'


@pytest.mark.parametrize("end", range(1, len(TEXT), 37))
def test_a_write_that_was_stopped_anywhere_is_done_again(end, tmp_path):
    write(tmp_path, TEXT[:end])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = ResultFile(tmp_path, STUDY)
    assert len(caught) == (0 if TEXT[end - 1] == "\n" else 1)
    whole = TEXT[:end].count("\n")
    assert len(file.results) == max(0, min(whole, 4) - 2)
    assert ResultFile(tmp_path, STUDY).results.keys() == file.results.keys()


def test_random_damage_gives_only_named_errors(tmp_path):
    rng, raw = np.random.default_rng(0), TEXT.encode()
    messages = []
    for _ in range(500):
        data = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(data)))
            match rng.integers(4):
                case 0:
                    data[place] ^= 1 << int(rng.integers(8))
                case 1:
                    del data[place : place + int(rng.integers(1, 30))]
                case 2:
                    data[place:place] = rng.bytes(int(rng.integers(1, 10)))
                case _:
                    data[place:place] = data[int(rng.integers(len(data))) :][:40]
        write(tmp_path, bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                file = ResultFile(tmp_path, STUDY)
            except InputError as error:
                messages.append(str(error))
            else:
                tables(Table(file))
    assert len(messages) > 350
    assert all(str(tmp_path / FILE) in message for message in messages)


def test_what_is_no_plain_file_is_not_resumed_from(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(InputError, match="is a FIFO"):
        ResultFile(tmp_path, STUDY)
    with pytest.raises(InputError, match="is a FIFO"):
        ProgressLog(tmp_path / FILE).report(step=1)


def tree():
    return {
        "step": jnp.int32(7),
        "w": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4),
        "on": jnp.array([True, False]),
        "m": jnp.ones(5),
    }


def test_every_bit_of_a_train_state_is_checked(tmp_path):
    state = tmp_path / "state"
    save_state(state, tree(), {"step": 3, "note": "é", "of": [1.5, None]})
    rng = np.random.default_rng(1)
    files = [path for path in state.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        raw = bytearray(path.read_bytes())
        for bit in rng.choice(8 * len(raw), 30, replace=False).tolist():
            raw[bit // 8] ^= 1 << bit % 8
            path.write_bytes(raw)
            with pytest.raises(CheckpointError, match=str(state)):
                load_state(state, tree())
            raw[bit // 8] ^= 1 << bit % 8
        for size in rng.choice(len(raw), 5).tolist():
            path.write_bytes(raw[:size])
            with pytest.raises(CheckpointError, match=str(state)):
                load_state(state, tree())
        path.unlink()
        with pytest.raises(CheckpointError, match=str(state)):
            load_state(state, tree())
        path.write_bytes(raw)
    more = state / "arrays-1" / "more"
    more.touch()
    with pytest.raises(CheckpointError, match=r"arrays-1/more has not the checksum.*delete it to start afresh"):
        load_state(state, tree())
    more.unlink()
    loaded, progress = load_state(state, tree())
    assert progress == {"step": 3, "note": "é", "of": [1.5, None]}
    jax.tree.map(np.testing.assert_array_equal, loaded, tree())


@pytest.mark.parametrize(
    "change", [{"folder": "../x"}, {"folder": 1}, {"arrays": []}, {"progress": None}, {"files": 3}]
)
def test_what_another_program_says_of_a_train_state(change, tmp_path):
    path = tmp_path / "state.safetensors"
    description = {"arrays": {}, "progress": {}, "folder": "arrays-1", "files": {}} | change
    write_tensor_file(path, Kind("vlcache_jax.train_state", "train state", 2, ""), description, {})
    with pytest.raises(CheckpointError, match="its description is of something else"):
        load_state(tmp_path, tree())


@pytest.mark.parametrize("kind", ["file", "FIFO", "link"])
def test_train_states_are_folders(kind, tmp_path):
    path = tmp_path / "state"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"the folder {path} cannot be created"):
        save_state(path, tree())
    with pytest.raises(CheckpointError, match=f"there is no train state at {path}"):
        load_state(path, tree())


ENTRY = {"task": "document", "images": ["a.png"], "question": "What?", "answer": "42"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "no list"),
        ([], "no list, or an empty one"),
        ([ENTRY, 3], "question 1 is 3"),
        ([ENTRY | {"answer": None}], "question 0 is"),
        ([ENTRY | {"images": []}], "question 0 is"),
        ([ENTRY | {"images": ["../../secret.png"]}], "which is no file beside it"),
        ([ENTRY | {"images": [7]}], "which is no file beside it"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "deep"),
        (None, "not a plain file"),
    ],
)
def test_questions_of_the_demo(entries, message, tmp_path):
    path = tmp_path / "questions.json"
    if entries is None:
        os.mkfifo(path)
    else:
        path.write_bytes(entries if isinstance(entries, bytes) else json.dumps(entries).encode())
    with pytest.raises(InputError, match=f"{path} is no list of questions .*{message}.*restore it"):
        read_questions(tmp_path)


@pytest.mark.parametrize(
    "change", [{"stage": 9}, {"step": -1}, {"step": 1.5}, {"step": True}, {"elapsed": "1"}, {"running": None}, {"x": 1}]
)
def test_progress_that_no_run_of_the_demo_saved(change, tmp_path):
    begin = {"stage": 0, "step": 0, "elapsed": 0.0, "running": 0.0, "entered": 0}
    reached = begin | {"stage": 1, "step": 40, "elapsed": 2, "running": 0.5}
    _check_reached(tmp_path, reached, begin, 2)
    with pytest.raises(CheckpointError, match=r"was not saved by a run of this recipe .*delete it"):
        _check_reached(tmp_path, reached | change, begin, 2)


def test_what_no_file_can_hold_is_named(tmp_path):
    with pytest.raises(InputError, match=r"\['key'\] has dtype key<fry>.*jax.random.key_data"):
        save_state(tmp_path / "state", {"key": jax.random.key(0)})
    with pytest.raises(InputError, match=r"progress cannot be written as JSON"):
        save_state(tmp_path / "state", tree(), {"loss": float("nan")})
    with pytest.raises(InputError, match=r"progress cannot be written as JSON"):
        save_state(tmp_path / "state", tree(), {"loss": jnp.ones(1)})
    nested = []
    for _ in range(40):
        nested = [nested]
    for progress in ({"x": nested}, {"x": 10**50}, {"x": "é" * 5_000_000}):
        with pytest.raises(InputError, match="description of a train state could not be read again: "):
            save_state(tmp_path / "state", tree(), progress)
    assert not list((tmp_path / "state").iterdir())
