"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: from checkpoint and images to logits and greedy answers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_promises import check, check_rows_alone_and_budget_one
from PIL import Image
from text_model import by_definition
from tiers import later
from tiny_qwen import IMAGE, image_processor, make_tiny_qwen, pictures, reference_inputs

import vlcache_jax as vlc
from vlcache_jax.models.families.qwen_vl.model import QwenVL
from vlcache_jax.models.families.registry import preset, read_config
from vlcache_jax.models.processor import Processor
from vlcache_jax.training.examples import make_train_batch

NEW = 32
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = [
    f"<|im_start|> user {SEEN} w1 w2 w3 <|im_end|>", f"w4 {SEEN} w5 <|image_pad|> w6 <|image_pad|> w7",
    "w1 w2 w3 w4 w5", f"w6 {SEEN}", "<|image_pad|>",
]  # fmt: skip


def images():
    a, b, c, d, e = pictures()
    return [[a], [b, c, d], [], [e], [a]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, make_tiny_qwen(folder, kind)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", [*later(KINDS[0]), *KINDS[1:]])
def test_parity(checkpoints, kind):
    folder, reference = checkpoints[kind]
    vlm = vlc.load(folder, dtype="float32")
    batch = vlm.processor(images=images(), text=TEXTS)
    logits = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))(vlm.params, batch)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    embedded = vlm.model.apply({"params": vlm.params}, batch, method="embed")
    for row, (text, of_row) in enumerate(zip(TEXTS, images())):
        inputs = reference_inputs(text, of_row)
        n = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(batch.tokens[row, : batch.lengths[row]], inputs["input_ids"][0])
        if of_row:
            grids, types = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
            positions, delta = reference.model.get_rope_index(inputs["input_ids"], types, grids)
            np.testing.assert_array_equal(embedded.positions[row, :, :n], positions[:, 0])
            assert embedded.next_position[row] == n + int(delta)
        # Greedy by definition: prompt and answer at once, each token the best behind those before it.
        ours = torch.from_numpy(np.array(out.tokens[row])).long()[None]
        whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], ours], dim=1)}
        whole |= {"attention_mask": torch.ones_like(whole["input_ids"])}
        whole |= {"mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))}
        with torch.no_grad():
            expected = reference(**whole).logits[0].numpy()
            if row < 2:
                answer = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[0, n:]
                np.testing.assert_array_equal(out.tokens[row], answer)
        np.testing.assert_allclose(logits[row, :n], expected[:n], atol=1e-4, rtol=0)
        assert np.abs(expected).max() > 1
        np.testing.assert_array_equal(out.tokens[row], expected[n - 1 : -1].argmax(axis=-1))


def test_pixels_equal_transformers(checkpoints):
    vlm = vlc.load(checkpoints["qwen2_vl"][0], dtype="float32")  # without windows its order is transformers'
    batch = vlm.processor(images=[pictures()], text=["<|image_pad|>" * 5])
    want = image_processor()(pictures(), return_tensors="np")["pixel_values"]
    want = want.reshape(len(want), 3, 2, -1)[:, :, 0].reshape(len(want), -1)
    assert batch.pixels.shape[1] >= len(want)
    np.testing.assert_allclose(batch.pixels[0, : len(want)], want, atol=1e-6)
    np.testing.assert_array_equal(batch.cells[0, len(want) :], -1)
    assert not batch.pixels[0, len(want) :].any()


def test_images_of_all_sizes_share_programs(checkpoints):
    vlm = vlc.load(checkpoints["qwen2_5_vl"][0], dtype="float32")
    traced = []

    @jax.jit
    def forward(params, batch):
        traced.append(batch.pixels.shape)
        return vlm.model.apply({"params": params}, batch, method="forward")

    a, b, c, d, _ = pictures()
    for of_row in ([a], [b, c], [d, d, c], []):
        batch = vlm.processor(images=[of_row], text=["w1 <|image_pad|>" * len(of_row) or "w1"], pad_tiles_to=256)
        assert np.isfinite(forward(vlm.params, batch)).all()
    assert len(traced) == 1


@pytest.mark.parametrize(("kind", "pruning"), [("qwen2_5_vl", None), ("qwen3_vl", vlc.PyramidDrop((1,), (0.5,)))])
def test_compressed_decoding_equals_the_full_model_with_the_rest_masked_out(checkpoints, kind, pruning):
    """What the first layers add goes with its tokens, where some are dropped before; a row is what it is alone."""
    vlm, policy = vlc.load(checkpoints[kind][0], dtype="float32"), vlc.VLCache(budget=0.4)
    model, params = vlm.model, vlm.params
    batch = vlm.processor(images=images(), text=TEXTS, pad_to=128, pad_tiles_to=256)
    there = pruning and stages_of(vlc.prefill(model, params, batch, vlc.FullCache(), pruning=pruning))
    logits, state = vlc.prefill(model, params, batch, policy, pruning=pruning).start(8)
    kept, tokens, found = [np.asarray(state.kept_positions(layer)) for layer in range(3)], [logits.argmax(-1)], []
    for _ in range(7):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(logits.argmax(-1))
        found.append(np.asarray(logits))
    expected = by_definition(model, params, batch, np.asarray(tokens[:-1]), kept, there=there)
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-4, rtol=0)
    if pruning is not None:
        return
    one = vlm.processor(images=[images()[1]], text=[TEXTS[1]], pad_to=128, pad_tiles_to=256)
    alone = vlc.generate(model, params, one, policy, 8, eos_token_ids=[])
    np.testing.assert_array_equal(np.asarray(tokens)[:, 1], alone.tokens[0])


@pytest.mark.parametrize("promises", [check, *later(check_rows_alone_and_budget_one)])
@pytest.mark.parametrize("kind", [*later("qwen2_vl"), "qwen2_5_vl", "qwen3_vl"])
def test_promises(checkpoints, kind, promises):
    promises(vlc.load(checkpoints[kind][0], dtype="float32"), images(), TEXTS)


def stages_of(context):
    """The prompt's tokens that each layer of a full cache holds, [layers][rows]."""
    held = [np.asarray(context.kept_positions(layer))[:, 0] for layer in range(3)]
    return [[row[row >= 0] for row in of_layer] for of_layer in held]


def test_deepstack_is_added_behind_the_first_layers(checkpoints):
    vlm = vlc.load(checkpoints["qwen3_vl"][0], dtype="float32")
    batch = vlm.processor(images=images()[:1], text=TEXTS[:1])
    embedded = vlm.model.apply({"params": vlm.params}, batch, method="embed")
    visual = np.asarray(batch.vision_index) != -1
    assert embedded.layer_inputs.shape == (2, *embedded.hidden.shape)
    assert (np.abs(embedded.layer_inputs[:, visual]).max(axis=-1) > 0).all()
    assert not np.asarray(embedded.layer_inputs[:, ~visual]).any()
    none = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "deepstack" in str(path) else x, vlm.params
    )
    with_it, without = (vlm.model.apply({"params": p}, batch, method="forward") for p in (vlm.params, none))
    assert np.abs(with_it - without)[0, int(batch.lengths[0]) - 1].max() > 0.1


def test_chat(checkpoints):
    vlm = vlc.load(checkpoints["qwen2_5_vl"][0], dtype="float32")
    a, b, *_ = pictures()
    parts = [{"type": "image", "image": a}, {"type": "text", "text": "w1"}, {"type": "image", "image": b}]
    batch = vlm.processor.chat([{"role": "user", "content": parts}])
    text = f"<|im_start|> user {SEEN} w1 {SEEN} <|im_end|> <|im_start|> assistant "
    np.testing.assert_array_equal(batch.tokens[0, : batch.lengths[0]], reference_inputs(text, [a, b])["input_ids"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_by_both(checkpoints, kind, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    vlm = vlc.load(checkpoints[kind][0], dtype="float32")
    vlc.save(vlm, tmp_path)
    again = vlc.load(tmp_path, dtype="float32")
    assert again.config == vlm.config
    assert again.processor.layout == vlm.processor.layout
    jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for name, weight in checkpoints[kind][1].state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    for picture in pictures():
        found, want = (
            x(picture, return_tensors="np")["image_grid_thw"]
            for x in (AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), image_processor())
        )
        np.testing.assert_array_equal(found, want)


def test_flat_configs_and_old_names_as_on_the_hub(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = checkpoints["qwen2_5_vl"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    scaling = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    flat = text | config | {"rope_scaling": scaling, "rope_theta": 1e4}
    flat["vision_config"] |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    weights = load_file(folder / "model.safetensors")
    new = {"model.visual.": "visual.", "model.language_model.": "model."}
    old = {next((k.replace(*x) for x in new.items() if x[0] in k), k): weight for k, weight in weights.items()}
    assert any(k.startswith("visual.") for k in old)
    save_file(old, tmp_path / "model.safetensors")
    found, want = vlc.load(tmp_path, dtype="float32"), vlc.load(folder, dtype="float32")
    assert found.config == want.config
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_size": 40}, "hidden_size is 40; expected the same as text_config.hidden_size, 32"),
        ("config.json", {"image_token_id": 64}, "image_token_id is 64; expected a token id below the vocab_size 64"),
        ("preprocessor_config.json", {"max_pixels": 2000}, "longest_edge = 3000 and max_pixels = 2000 are the same"),
        ("preprocessor_config.json", {"min_pixels": "few", "size": None}, "min_pixels = .few. is not supported"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size = 14, but the vision tower of config.json has 4"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize = false is not supported"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 4000, "longest_edge": 3000}}, "at least 4000 pixels"),
    ],
)  # fmt: skip
def test_refusals(checkpoints, tmp_path, file, change, message):
    for path in checkpoints["qwen2_5_vl"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(values | change))
    with pytest.raises(vlc.CheckpointError, match=message):
        vlc.load(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type is .yarn."),
        (
            "text_config",
            {"rope_scaling": {"mrope_section": [3, 3, 2], "mrope_interleaved": False}},
            "mrope_interleaved is False; expected true",
        ),
        ("vision_config", {"num_position_embeddings": 35}, "num_position_embeddings is 35; expected a square number"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, "expected rising numbers below 3"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "expected rising numbers below 3"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5e5}}, "expected rope_type axial and rope_theta 10000"),
        ("vision_config", {"out_hidden_size": 48}, "expected features as wide as the decoder, 32"),
        (None, {"model_type": "qwen3_vl_moe"}, "this is a Qwen3-VL with experts"),
    ],
)
def test_refusals_of_qwen3_vl(checkpoints, tmp_path, part, change, message):
    values = json.loads((checkpoints["qwen3_vl"][0] / "config.json").read_text())
    (values[part] if part else values).update(change)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(vlc.CheckpointError, match=message):
        read_config(tmp_path)


def test_configs_of_transformers_4_and_5_are_one(checkpoints, tmp_path):
    values = json.loads((checkpoints["qwen3_vl"][0] / "config.json").read_text())
    rope = values["text_config"].pop("rope_parameters")
    values["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"mrope_interleaved": True}}
    values["vision_config"] |= {"model_type": "qwen3_vl", "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}')
    assert read_config(tmp_path) == vlc.load(checkpoints["qwen3_vl"][0], dtype="float32").config


def test_rotations_are_of_float32_whatever_the_model_computes_in(checkpoints):
    """Half precision has no odd numbers beyond 256 (bfloat16) or 2048 (float16)."""
    far = jnp.asarray([[[2049, 2050]] * 3])
    x = jnp.ones((1, 2, 2, 16), jnp.bfloat16)
    found = [
        vlc.load(checkpoints["qwen3_vl"][0], dtype=dtype).model.apply({"params": {}}, x, far, method="rotate")
        for dtype in ("bfloat16", "float32")
    ]
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0][:, 0] - found[0][:, 1]).max() > 0.5


def test_rope_that_is_not_supported(checkpoints, tmp_path):
    for path in checkpoints["qwen2_5_vl"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"rope_type": "yarn"}, "yarn"), ({"mrope_section": [2, 2, 1]}, "add up to")):
        text = values["text_config"]
        rope = {"rope_parameters": text["rope_parameters"] | change}
        (tmp_path / "config.json").write_text(json.dumps(values | {"text_config": text | rope}))
        with pytest.raises(vlc.CheckpointError, match=message):
            vlc.load(tmp_path, dtype="float32")


def test_a_picture_that_is_too_long_and_patches_that_do_not_fit(checkpoints):
    from PIL import Image

    processor = vlc.load(checkpoints["qwen2_5_vl"][0], dtype="float32").processor
    with pytest.raises(vlc.InputError, match=r"row 0, image 0 is 1000 x 4 pixels: one side is more than 200 times"):
        processor(images=[Image.new("RGB", (1000, 4))], text=["<|image_pad|>"])
    with pytest.raises(vlc.InputError, match="pad_tiles_to"):
        processor(images=[pictures()[4]], text=["<|image_pad|>"], pad_tiles_to=16)


def test_limits_of_images_in_all_spellings(checkpoints):
    folder, images = checkpoints["qwen2_5_vl"][0], pictures()
    few = Processor.from_folder(folder, image_limits={"max_image_tokens": 8})
    sizes = few.measure([images, []], ["<|image_pad|> " * 5, "w1 w2"])
    assert max(sizes[0].images) <= 8
    assert sizes[0].tokens == sum(sizes[0].images) == sizes[0].tiles // 4
    batch = few([images], ["<|image_pad|> " * 5])
    assert sizes[0].bucket == (batch.length, batch.pixels.shape[1])
    assert sizes[1] == dataclasses.replace(sizes[1], tokens=2, images=(), tiles=0)
    for same in ({"max_pixels": 512}, {"size": {"longest_edge": 512}}, {"max_pixels": 512, "max_image_tokens": 8}):
        assert Processor.from_folder(folder, image_limits=same).layout == few.layout
    trained = make_train_batch(few, [images], ["<|image_pad|> " * 5], ["w1"], 128)
    np.testing.assert_array_equal(trained.batch.cells, batch.cells)  # on the model's own three axes
    assert trained.positions is None
    own = vlc.load(folder, dtype="float32", image_limits={"min_pixels": 640})
    assert (own.processor.layout.min_pixels, own.processor.layout.max_pixels) == (640, 3000)
    for limits, message in (
        ({"max_pixels": 500, "max_image_tokens": 8}, "max_pixels = 500 and max_image_tokens = 8 are the same limit"),
        ({"max_pixels": 500, "size": {"longest_edge": 600}}, "are the same limit"),
        ({"max_image_tokens": "few"}, "expected a number of visual tokens"),
        ({"max_pixels": 10}, "would need at least 64 pixels and at most 10"),
        ({"size": {"height": 10, "width": 10}}, "give shortest_edge and longest_edge"),
        ({"max_tokens": 8}, "'max_tokens' is no limit of images"),
        ({"pixel_prune": 1.5}, "give the threshold, 0 for equal patches only"),
    ):
        with pytest.raises(vlc.InputError, match=message):
            Processor.from_folder(folder, image_limits=limits)


def page():
    """White but for a few marks."""
    pixels = np.full((56, 40, 3), 255, np.uint8)
    pixels[9:12, 3:30] = pixels[33:35, 17:22] = 0
    return Image.fromarray(pixels)


def test_repeated_patches_are_left_out(checkpoints):
    """Of a page, not of random pictures; other limits stay what they are."""
    folder = checkpoints["qwen2_5_vl"][0]
    plain, pruned = (Processor.from_folder(folder, image_limits=limits) for limits in ({}, {"pixel_prune": 0}))
    assert pruned.layout == dataclasses.replace(plain.layout, pixel_prune=0)
    before, after = (processor(images(), TEXTS) for processor in (plain, pruned))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    (size,), (whole,) = (processor.measure([page()], "w1 <|image_pad|> w2") for processor in (pruned, plain))
    assert size.tokens < whole.tokens / 2


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_answers_about_a_page_without_its_repeats(checkpoints, kind):
    """Tokens that stay have the positions of the whole page, and so has what follows."""
    vlm = vlc.load(checkpoints[kind][0], dtype="float32", image_limits={"pixel_prune": 0})
    whole = Processor.from_folder(checkpoints[kind][0])
    texts, seen = ["w1 <|image_pad|> w2", "w3 w4 w5"], [[page()], []]
    embedded, spots = [], []
    for processor in (whole, vlm.processor):
        batch = processor(seen, texts)
        embedded.append(vlm.model.apply({"params": vlm.params}, batch, method="embed"))
        index = np.asarray(batch.vision_index)[0, 1 : batch.lengths[0] - 1]
        spots.append([tuple(x) for x in np.asarray(batch.cells)[0, 4 * index, 2:].tolist()])
    positions = [np.asarray(x.positions)[0, :, 1:] for x in embedded]
    for number, spot in enumerate(spots[1]):
        np.testing.assert_array_equal(positions[1][:, number], positions[0][:, spots[0].index(spot)])
    np.testing.assert_array_equal(embedded[0].next_position, embedded[1].next_position)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(0.5), 8, pruning=vlc.FastV(layer=1))
    assert np.asarray(out.report.finite).all()


def test_regions_cover_the_image(checkpoints):
    processor = vlc.load(checkpoints["qwen2_5_vl"][0], dtype="float32").processor
    for picture in pictures():
        (boxes,) = processor.layout.token_regions([(picture.height, picture.width)])
        batch = processor(images=[picture], text=["<|image_pad|>"])
        assert len(boxes) == (batch.tokens[0, : batch.lengths[0]] == IMAGE).sum()
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        np.testing.assert_allclose(areas.sum(), picture.height * picture.width, rtol=1e-5)
        assert boxes[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656), ("qwen3-vl-2b", 2_127_532_032),
        ("qwen3-vl-4b", 4_437_815_808), ("qwen3-vl-8b", 8_767_123_696),
    ],
)  # fmt: skip
def test_presets_have_the_published_numbers_of_parameters(name, published):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(QwenVL(preset(name)).abstract_params())) == published


def test_presets_have_the_sizes_of_the_classes_of_transformers():
    """Where its defaults are those of a published tower: of Qwen3-VL-8B, and of Qwen2.5-VL."""
    theirs, ours = transformers.Qwen3VLConfig().vision_config, preset("qwen3-vl-8b").vision
    assert (theirs.depth, theirs.hidden_size, theirs.intermediate_size) == (27, ours.hidden_size, 4304)
    assert (ours.num_layers, ours.intermediate_size, ours.num_heads) == (27, 4304, theirs.num_heads)
    assert (ours.patch_size, ours.table_side**2) == (theirs.patch_size, theirs.num_position_embeddings)
    assert ours.deepstack_layers == tuple(theirs.deepstack_visual_indexes)
    theirs, config = transformers.Qwen2_5_VLConfig(), preset("qwen2.5-vl-7b")
    vision, ours = theirs.vision_config, config.vision
    assert (ours.num_layers, ours.intermediate_size) == (vision.depth, vision.intermediate_size)
    assert (ours.num_heads, ours.patch_size) == (vision.num_heads, vision.patch_size)
    assert (ours.window * ours.patch_size, ours.output_size) == (vision.window_size, vision.out_hidden_size)
    assert ours.full_layers == tuple(vision.fullatt_block_indexes)
    assert config.decoder.vocab_size == theirs.text_config.vocab_size
