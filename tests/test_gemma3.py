"""Gemma 3 with images against transformers, from a checkpoint and pictures to answers; what it refuses."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_promises import check, check_rows_alone_and_budget_one
from PIL import Image
from safetensors.torch import save_file
from text_model import by_definition
from tiers import later
from tiny_gemma3 import NAMED, TOKENS, make_processor, make_tiny_gemma3

import vlcache_jax as vlc
from vlcache_jax.explain.pictures import explain
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.families.gemma3.model import Gemma3, blocks_of
from vlcache_jax.models.families.gemma3.pan_and_scan import PanAndScan
from vlcache_jax.models.families.registry import preset, read_config, write_config
from vlcache_jax.models.processor import Processor

NEW = 32
START = NAMED["boi_token"]
TEXTS = (
    f"{START}w1 w2 w3", f"w4 {START} w5 w6 {START}\nw7 w8", "w1 w2 w3 w4 w5", f"w1 w2 {START}{START}", f"w6\n{START}",
)  # fmt: skip


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((40, 50), (33, 90), (5, 300), (16, 16), (97, 31), (2, 2))
    a, b, c, d, e, f = (Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes)
    return [[a], [b, c], [], [d, e], [f]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    return folder, make_tiny_gemma3(folder), make_processor()


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return vlc.load(checkpoint[0], dtype="float32", layout="stacked")


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.processor(images=pictures(), text=list(TEXTS))


def test_parity(checkpoint, vlm, batch):
    """Ids, pixels, logits at every position and greedy answers: one image, several, none; a ragged batch."""
    _, reference, processor = checkpoint
    logits = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))(vlm.params, batch)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    for row, (text, of_row) in enumerate(zip(TEXTS, pictures())):
        inputs = processor(images=of_row or None, text=text, return_tensors="pt")
        n = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(batch.tokens[row, : batch.lengths[row]], inputs["input_ids"][0])
        if of_row:
            theirs = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
            np.testing.assert_allclose(batch.pixels[row, : len(of_row)], theirs, atol=1e-6)
        with torch.no_grad():
            expected = reference(**inputs).logits[0].numpy()
            answer = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[0, n:]
        np.testing.assert_allclose(logits[row, :n], expected, atol=1e-4, rtol=0)
        assert np.abs(expected).max() > 1
        np.testing.assert_array_equal(out.tokens[row], answer)


def test_chat(checkpoint, vlm):
    _, _, processor = checkpoint
    image = pictures()[0][0]
    talk = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        {"role": "user", "content": [{"type": "text", "text": "w4 "}, {"type": "image", "image": image}]},
    ]
    ours = vlm.processor.chat(talk)
    theirs = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    np.testing.assert_array_equal(ours.tokens[0, : ours.lengths[0]], theirs["input_ids"][0])
    assert (ours.vision_index[0] != TEXT).sum() == 2 * TOKENS
    assert ours.vision_index.max() == 2 * TOKENS - 1


def test_compressed_decoding_equals_the_full_model_with_the_rest_masked_out(vlm, batch):
    """In layers without a window; those with one go on with theirs. A row is what it is alone."""
    model, params, policy = vlm.model, vlm.params, vlc.VLCache(budget=0.4)
    logits, state = vlc.prefill(model, params, batch, policy).start(6)
    new, found, first = np.random.default_rng(0).integers(9, 58, (6, batch.size)).astype(np.int32), [], state
    for tokens in new:
        logits, state = vlc.decode_step(model, params, tokens, state)
        found.append(np.asarray(logits))
    assert model.spec.full_layers == (1,)
    kept = {1: np.asarray(first.kept_positions(1))}
    assert (kept[1][1] >= 0).sum(axis=-1).max() < 0.5 * batch.lengths[1]
    np.testing.assert_allclose(np.stack(found), by_definition(model, params, batch, new, kept), atol=1e-4, rtol=0)


@pytest.mark.parametrize("promises", [check, *later(check_rows_alone_and_budget_one)])
def test_promises(vlm, promises):
    promises(vlm, pictures(), list(TEXTS))


def test_blocks_are_those_of_transformers():
    from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

    visual = np.random.default_rng(0).random((6, 40)) < 0.6  # images side by side included
    expected = get_block_sequence_ids_for_mask(torch.from_numpy(visual).long()).numpy()
    np.testing.assert_array_equal(blocks_of(jnp.asarray(visual)), expected)


def test_what_is_saved_is_read_here_and_by_transformers(checkpoint, vlm, batch, tmp_path):
    folder, reference, _ = checkpoint
    vlc.save(vlm, tmp_path)
    again = vlc.load(tmp_path, "float32", layout="stacked")
    assert again.config == vlm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
    jax.tree.map(np.testing.assert_array_equal, again.processor(images=pictures(), text=list(TEXTS)), batch)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is type(reference)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    ours, theirs = (transformers.AutoProcessor.from_pretrained(path) for path in (tmp_path, folder))
    assert (type(ours), ours.chat_template) == (type(theirs), theirs.chat_template)
    a, b = (p(images=pictures()[1], text=TEXTS[1], return_tensors="pt") for p in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])


@pytest.mark.parametrize("old", [True, False])
def test_older_and_newer_names_of_tensors(checkpoint, vlm, tmp_path, old):
    """The released checkpoints', with a pooling head that nothing reads; and those of transformers 5 in memory."""
    folder, reference, _ = checkpoint
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = {name: value.contiguous() for name, value in reference.state_dict().items() if "lm_head" not in name}
    if old:
        tower = "model.vision_tower."
        tensors = {
            name.replace(tower, f"{tower}vision_model.")
            .replace("model.language_model.", "model.language_model.model.")
            .removeprefix("model."): value
            for name, value in tensors.items()
        }
        assert "language_model.model.norm.weight" in tensors
        tensors["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = vlc.load(tmp_path, "float32", layout="stacked").params
    jax.tree.map(np.testing.assert_array_equal, found, vlm.params)


def test_a_config_of_transformers_4_and_one_with_nothing_but_what_differs_from_the_defaults(tmp_path):
    """The 4B model's as released."""
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    released = read_config(tmp_path)
    assert released == preset("gemma-3-4b-it")
    assert released.decoder.extended_positions == 131072
    assert [i for i, window in enumerate(released.decoder.windows) if window is None] == [5, 11, 17, 23, 29]
    for name in ("4b", "12b", "27b"):
        config = preset(f"gemma-3-{name}-it")
        write_config(config, tmp_path / name)
        assert read_config(tmp_path / name) == config
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / name).text_config
        assert theirs.query_pre_attn_scalar == (168 if name == "27b" else 256)
        assert theirs.layer_types.count("full_attention") == config.decoder.num_layers // 6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gemma-3-4b-it", 4_300_079_472), ("gemma-3-12b-it", 12_187_325_040), ("gemma-3-27b-it", 27_432_406_640)],
)
def test_parameters_are_the_published_ones(name, parameters):
    params = Gemma3(preset(name)).abstract_params()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(
    ("file", "section", "change", "message"),
    [
        ("config.json", None, {"model_type": "gemma3_text"}, "; this is a Gemma 3 without a vision tower"),
        ("config.json", None, {"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9; expected the square .* the 8 pat"),
        ("config.json", None, {"mm_tokens_per_image": 15}, "mm_tokens_per_image is 15"),
        ("config.json", None, {"image_token_index": 99}, "image_token_index is 99; expected a token id below"),
        ("config.json", None, {"boi_token_index": -1}, "boi_token_index is -1; expected a token id below"),
        ("config.json", None, {"tie_word_embeddings": False}, "text_config.tie_word_embeddings is True; expected fal"),
        ("config.json", "text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; .* null"),
        ("config.json", "text_config", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; .* null"),
        ("config.json", "text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("config.json", "text_config", {"layer_types": ["sliding_attention"] * 3}, "at least one layer of full_atten"),
        ("config.json", "text_config", {"model_type": "gemma2"}, "text_config.model_type is .gemma2."),
        ("config.json", "vision_config", {"model_type": "clip_vision_model"}, "supported siglip_vision_model"),
        ("config.json", "vision_config", {"image_size": 15}, "image_size is 15; expected a multiple of the patch_size"),
        ("processor_config.json", "image_processor", {"do_pan_and_scan": 1}, "do_pan_and_scan is 1; expected true or"),
        (
            "processor_config.json", "image_processor", {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 1},
            "pan_and_scan_max_num_crops is 1; expected a whole number from 2",
        ),
        ("processor_config.json", "image_processor", {"size": {"height": 8, "width": 8}}, r"of \(8, 8\) pixels, but"),
        ("processor_config.json", "image_processor", {"size": {"shortest_edge": 16}}, "but the vision tower takes"),
        ("tokenizer_config.json", None, {"boi_token": None, "extra_special_tokens": {}}, "names no boi_token"),
    ],
)  # fmt: skip
def test_what_is_refused(checkpoint, tmp_path, file, section, change, message):
    shutil.copytree(checkpoint[0], tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / file).read_text())
    (values if section is None else values[section]).update(change)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(vlc.CheckpointError, match=message):
        vlc.load(tmp_path)


def test_prompts_that_do_not_fit_their_images(vlm):
    image = pictures()[0][0]
    with pytest.raises(vlc.InputError, match="holds 0 image tokens '<start_of_image>', but 1 images"):
        vlm.processor(images=[[image]], text=["w1"])
    with pytest.raises(vlc.InputError, match="17 of them visual, but its images have 16 features"):
        vlm.processor(images=[[image]], text=[f"{START} <image_soft_token>"])
    for token in (START, "<image_soft_token>"):
        with pytest.raises(vlc.InputError, match=f"text 0 holds '{token}': images belong into the prompt"):
            vlm.processor.continuation(f"w1 {token}")


def test_visual_tokens_have_places_in_their_images(vlm, batch):
    (whole,) = vlm.processor.layout.token_regions([(40, 80)])
    np.testing.assert_array_equal(
        whole[[0, 3, 4, 15]], [[0, 0, 20, 10], [60, 0, 80, 10], [0, 10, 20, 20], [60, 30, 80, 40]]
    )
    row = jax.tree.map(lambda x: x[:1], batch)
    ctx = vlc.compress(vlm.model, vlm.params, row, vlc.VLCache(budget=0.4))
    assert explain(pictures()[0], row, ctx, ctx.report, vlm.processor.layout).width > 0


def test_pan_and_scan(checkpoint, vlm, tmp_path):
    """Crops of elongated images behind the whole: ids, pixels, places, and what a saved folder says of them."""
    _, _, processor = checkpoint
    scan = PanAndScan(min_crop_size=16)
    layout = dataclasses.replace(vlm.processor.layout, pan_and_scan=scan)
    parts = {"tokenizer": vlm.processor.tokenizer, "image_token": START, "special_tokens": NAMED}
    ours = Processor(**parts, layout=layout)
    options = {"do_pan_and_scan": True} | scan.as_dict()
    sizes = ((40, 50), (33, 90), (20, 300), (16, 16), (97, 31), (40, 33), (33, 40), (40, 41), (12, 90))
    counts = []
    for height, width in sizes:
        image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
        batch = ours(images=[[image]], text=[f"w1 {START} w2"])
        theirs = processor(images=[image], text=f"w1 {START} w2", return_tensors="pt", **options)
        np.testing.assert_array_equal(batch.tokens[0, : batch.lengths[0]], theirs["input_ids"][0])
        np.testing.assert_allclose(batch.pixels[0], theirs["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-6)
        regions = layout.token_regions([(height, width)])[0].reshape(-1, TOKENS, 4)
        assert len(regions) == len(batch.pixels[0])
        assert batch.vision_index.max() == len(regions) * TOKENS - 1
        crops = regions[1:] if len(regions) > 1 else regions
        area = ((crops[..., 2] - crops[..., 0]) * (crops[..., 3] - crops[..., 1])).sum()
        np.testing.assert_allclose(area, height * width, rtol=1e-5)
        counts.append(len(regions) - 1)
    assert set(counts) == {0, 2, 3, 4}
    vlc.save(dataclasses.replace(vlm, processor=ours), tmp_path)
    assert Processor.from_folder(tmp_path).layout == layout
