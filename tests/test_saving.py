"""`vlc.save`: what it writes loads in the library and in transformers, whole, and is never a mixture."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_checkpoint_kills import Killed, kill_at
from tiers import later
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc

MODELS = {"llava": {}, "llava_next": {"next": True, "family": "qwen2"}}


@pytest.fixture(scope="module", params=MODELS)
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "original"
    make_tiny_llava(folder, **MODELS[request.param])
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    make_tiny_llava(folder)
    return folder


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tuned(vlm, factor=1.5, dtype=None):
    return dataclasses.replace(vlm, params=jax.tree.map(lambda x: (x * factor).astype(dtype or x.dtype), vlm.params))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CHAT = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "w1 w2"}]}]


def test_a_saved_folder_loads_here_and_in_transformers(original, tmp_path):
    vlm = vlc.load(original, dtype="float32")
    vlc.save(tuned(vlm), tmp_path / "saved", max_shard_bytes=50_000)
    again = vlc.load(tmp_path / "saved", dtype="float32")
    assert_same(again.params, tuned(vlm).params)
    assert again.config == vlm.config
    for ask in (lambda v: v.processor(images=[picture()], text=["<image> w1 w5"]), lambda v: v.processor.chat(CHAT)):
        assert_same(ask(again), ask(vlm))

    ours, theirs = (transformers.AutoProcessor.from_pretrained(f) for f in (tmp_path / "saved", original))
    assert type(ours) is type(theirs)
    assert ours.chat_template == theirs.chat_template
    a, b = (p(images=[picture()], text=["<image> w1 w5"], return_tensors="pt") for p in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])
    kind = type(transformers.AutoModelForImageTextToText.from_pretrained(original))
    model, info = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.generation_config.eos_token_id == 2
    out = model.eval().generate(**a, max_new_tokens=4, do_sample=False)
    mine = vlc.generate(
        again.model, again.params, again.processor(images=[picture()], text=["<image> w1 w5"]), max_new_tokens=4
    )
    count = int(mine.lengths[0])
    assert out[0, a["input_ids"].shape[1] :].tolist()[:count] == mine.tokens[0, :count].tolist()


def test_saving_over_the_folder_that_was_loaded(original, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    vlm = vlc.load(folder, dtype="float32")
    vlc.save(tuned(vlm), folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert before.keys() == after.keys()
    assert_same(vlc.load(folder, dtype="float32").params, tuned(vlm).params)

    vlc.save(tuned(vlm, 2.0, jnp.bfloat16), folder, max_shard_bytes=50_000)  # and in another dtype, in shards
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(vlc.load(folder).params, tuned(vlm, 2.0, jnp.bfloat16).params)
    assert not (folder / "model.safetensors").exists()
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


def edited(folder, name, **values):
    path = folder / name
    entries = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: x for key, x in (entries | values).items() if x is not ...}))


def image_settings(folder, **values):
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"] |= values
    (folder / "processor_config.json").write_text(json.dumps(settings))


PROCESSORS = {
    "several templates": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'w9 <image>' }}"),
    ),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "a fixed size": lambda folder: image_settings(folder, size={"height": 32, "width": 32}, do_center_crop=False),
    "padded to squares": lambda folder: image_settings(
        folder, image_processor_type="LlavaImageProcessor", do_pad=True, do_center_crop=False
    ),
    "not normalised": lambda folder: image_settings(folder, do_normalize=False, do_rescale=False, resample=2),
    "special tokens split": lambda folder: edited(folder, "tokenizer_config.json", split_special_tokens=True),
    "another special token": lambda folder: edited(
        folder,
        "tokenizer_config.json",
        extra_special_tokens={"crop_token": "w7", "image_token": "<image>"},
        sep_token={"__type": "AddedToken", "content": "w8", "lstrip": True, "rstrip": True, "special": True},
    ),
}


# transformers leaves the files of additional templates open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_every_kind(llava, tmp_path, name):
    shutil.copytree(llava, tmp_path / "from")
    PROCESSORS[name](tmp_path / "from")
    vlm = vlc.load(tmp_path / "from", dtype="float32")
    vlc.save(vlm, tmp_path / "to")
    a, b = vlm.processor, vlc.load(tmp_path / "to", dtype="float32").processor
    assert a.chat_templates == b.chat_templates
    assert (name == "several templates") == ((tmp_path / "to" / "additional_chat_templates").exists())
    assert a.layout.transform == b.layout.transform
    assert a.tokenizer.special_tokens.items() <= b.tokenizer.special_tokens.items()
    prompt = "<image> w1 w7  w8 w9</s>"
    assert a.tokenizer.encode(prompt) == b.tokenizer.encode(prompt)
    if name != "special tokens split":
        assert_same(a(images=[picture()], text=[prompt]), b(images=[picture()], text=[prompt]))
        theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "to").tokenizer
        assert theirs(prompt)["input_ids"] == a.tokenizer.encode(prompt)
    vlc.save(vlm, tmp_path / "from")  # which says the same already
    vlc.save(vlm, tmp_path / "to")


def test_dtypes_are_those_of_the_parameters(llava, tmp_path):
    vlm = vlc.load(llava, dtype="bfloat16", param_dtype="float32")
    vlc.save(vlm, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert_same(vlc.load(tmp_path, dtype="float32").params, vlc.load(llava, dtype="float32").params)


def loaded(folder):
    """The checkpoint in a folder, or None if it does not load."""
    try:
        return vlc.load(folder, dtype="float32")
    except vlc.CheckpointError:
        return None


@pytest.mark.parametrize("place", ["new", *later("old")])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(llava, tmp_path, place):
    vlm = vlc.load(llava, dtype="float32")
    old, new = tuned(vlm, 2.0), tuned(vlm, 3.0)
    seen, step, finished = [], 0, False
    while not finished:
        folder = tmp_path / str(step)
        if place == "old":
            shutil.copytree(llava, folder)
            vlc.save(old, folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            try:
                vlc.save(new, folder, max_shard_bytes=100_000)
            except Killed:
                pass
            else:
                finished = True
        found = loaded(folder)
        if found is None:
            seen.append("nothing")
        else:
            scales = [float(x.params["decoder"]["final_norm"]["scale"][0]) for x in (found, old, new)]
            seen.append("old" if scales[0] == scales[1] else "new")
            assert_same(found.params, (old if seen[-1] == "old" else new).params)
        step += 1
    first = "nothing" if place == "new" else "old"
    switched = seen.index("new")
    assert set(seen[:switched]) == {first}
    assert set(seen[switched:]) == {"new"}
    vlc.save(old, tmp_path / "0")  # a killed save does not keep the next one from saving
    assert_same(vlc.load(tmp_path / "0", dtype="float32").params, old.params)


def test_a_folder_with_another_model_is_refused(llava, tmp_path):
    vlm = vlc.load(llava, dtype="float32")
    folder = tmp_path / "other"
    make_tiny_llava(folder, text={"rope_theta": 5000.0})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(vlc.InputError, match=r"other holds another model: its config.json .* choose another folder"):
        vlc.save(vlm, folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(vlc.InputError, match="holds weights of a model that cannot be read"):
        vlc.save(vlm, folder)
    (folder / "tokenizer.json").write_bytes(before["tokenizer.json"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_links_are_not_written_through(llava, tmp_path):
    vlm = vlc.load(llava, dtype="float32")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "precious").write_text("old")
    (folder / "tokenizer.json").symlink_to(tmp_path / "precious")
    with pytest.raises(vlc.InputError, match="is a link to"):
        vlc.save(vlm, folder)
    assert (tmp_path / "precious").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_no_folder_is_left_by_a_link(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "from")
    PROCESSORS["several templates"](tmp_path / "from")
    vlm = vlc.load(tmp_path / "from", dtype="float32")
    (tmp_path / "to").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(vlc.InputError, match="additional_chat_templates is a link to"):
        vlc.save(vlm, tmp_path / "to")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_parameter_without_a_place_is_named(llava, tmp_path):
    vlm = vlc.load(llava, dtype="float32")
    with pytest.raises(vlc.CheckpointError, match="extra/kernel has no place in a model of this config"):
        vlc.save(dataclasses.replace(vlm, params=vlm.params | {"extra": {"kernel": jnp.ones(2)}}), tmp_path / "new")
