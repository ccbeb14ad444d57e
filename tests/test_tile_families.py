"""Families whose images are square tiles against transformers: from a checkpoint and pictures to answers."""

import dataclasses
import json
import math
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from family_promises import check, check_rows_alone_and_budget_one
from processors_of_transformers import Frames
from safetensors.torch import save_file
from text_model import by_definition
from tiers import later
from tiny_families import TINY, pictures

import vlcache_jax as vlc
from vlcache_jax.explain.pictures import explain
from vlcache_jax.explain.shown import shown
from vlcache_jax.inputs import NEWLINE, TEXT
from vlcache_jax.models.families.internvl.layout import InternLayout
from vlcache_jax.models.families.registry import family_of, preset, read_config, write_config
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.training.examples import make_train_batch

NEW = 32
PRESETS = {
    "llava-onevision-qwen2-0.5b-ov": 894e6,
    "llava-onevision-qwen2-7b-ov": 8.03e9,
    "internvl3-1b": 938e6,
    "internvl3-2b": 2.09e9,
    "internvl3-8b": 7.94e9,
    "internvl3.5-1b": 1.06e9,
    "internvl3.5-4b": 4.73e9,
    "internvl3.5-14b": 15.12e9,
    "smolvlm2-256m": 256.5e6,
    "smolvlm2-500m": 507e6,
    "smolvlm2-2.2b": 2.246e9,
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    tiny: object
    folder: object
    reference: object
    vlm: object
    batch: object
    forward: object


@pytest.fixture(scope="module", params=TINY)
def loaded(request, tmp_path_factory):
    tiny, folder = TINY[request.param], tmp_path_factory.mktemp(request.param)
    reference = tiny.make(folder)
    vlm = vlc.load(folder, dtype="float32", layout="stacked")
    forward = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))
    return Loaded(tiny, folder, reference, vlm, vlm.processor(images=pictures(), text=tiny.texts), forward)


def test_parity(loaded):
    """Ids, pixels, logits at every position and greedy answers: several sizes, several images, none; a ragged batch."""
    processor, rows = loaded.tiny.processor(), []
    for text, images in zip(loaded.tiny.texts, pictures()):
        rows.append(processor(images=[images] if images else None, text=[text], return_tensors="pt"))
    check_parity(loaded, loaded.batch, rows)


def check_parity(loaded, batch, rows):
    """A batch of the shapes of `loaded.batch`, whose programs are compiled, with transformers' inputs for its rows."""
    vlm = loaded.vlm
    logits = loaded.forward(vlm.params, batch)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    for row, inputs in enumerate(rows):
        n = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(batch.tokens[row, : batch.lengths[row]], inputs["input_ids"][0])
        pixels = [inputs[key].numpy() for key in ("pixel_values", "pixel_values_videos") if key in inputs]
        if pixels:
            theirs = np.concatenate([x.reshape(-1, *x.shape[-3:]) for x in pixels]).transpose(0, 2, 3, 1)
            np.testing.assert_allclose(batch.pixels[row, : len(theirs)], theirs, atol=1e-6)
        with torch.no_grad():
            expected = loaded.reference(**inputs).logits[0].numpy()
            answer = loaded.reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[0, n:]
        np.testing.assert_allclose(logits[row, :n], expected, atol=1e-4, rtol=0)
        assert np.abs(expected).max() > 1
        np.testing.assert_array_equal(out.tokens[row], answer)


def test_prompts_without_an_image_take_the_program_of_those_with_one(loaded):
    size = {"pad_to": loaded.batch.length, "pad_tiles_to": loaded.batch.pixels.shape[1]}
    batch = loaded.vlm.processor(images=[[]] * loaded.batch.size, text=["w1"] * loaded.batch.size, **size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), loaded.batch)


def test_videos(loaded):
    """As above, of frames that are not square, at odd times; beside an image where transformers takes both."""
    if loaded.tiny.frames is None:
        with pytest.raises(vlc.InputError, match="row 0, image 0 is a video, but this model takes none"):
            loaded.vlm.processor(images=[[vlc.Video([pictures()[0][0]] * 2, fps=1.0)]], text=[loaded.tiny.image])
        return
    frames = np.random.default_rng(2).integers(0, 256, (3, 40, 70, 3), dtype=np.uint8)
    video, image = vlc.Video(frames, times=[0.0, 1.6, 65.0], duration=3671.5), pictures()[5][0]
    processor, (make, key) = loaded.tiny.processor(), loaded.tiny.frames
    processor.video_processor = Frames(make(), key, video.times, video.duration)
    texts, visuals = ["w1 <video> w2 w3", f"{loaded.tiny.image} w4 <video> w5"], [[video], [image, video]]
    if key == "pixel_values":  # in which transformers' videos take the place of its images
        texts, visuals = texts[:1], visuals[:1]
    rows = [
        processor(text=[text], images=[of_row[0]] if len(of_row) > 1 else None, videos=[frames], return_tensors="pt")
        for text, of_row in zip(texts, visuals)
    ]
    rest = loaded.batch.size - len(rows)
    sizes = {"pad_to": loaded.batch.length, "pad_tiles_to": loaded.batch.pixels.shape[1]}
    ours = loaded.vlm.processor(images=visuals + [[]] * rest, text=texts + ["w1"] * rest, **sizes)
    check_parity(loaded, ours, rows)
    text = loaded.vlm.processor.layout.encode_video(video, "the video", loaded.vlm.processor.special_tokens).text
    assert text == processor.replace_video_token(processor.video_processor([frames]), 0)
    _, regions = shown([video], loaded.vlm.processor.layout)
    assert np.concatenate(regions).shape[0] == (ours.vision_index[0] != TEXT).sum()
    assert all(np.nanmax(boxes[:, 2:], axis=0).tolist() == [70, 40] for boxes in regions)
    talk = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "w2"}]}]
    batch = loaded.vlm.processor.chat(talk)
    np.testing.assert_array_equal(batch.pixels[0], ours.pixels[0, :3])


def test_parity_of_internvl3_5(tmp_path):
    """Its decoder is Qwen3, with norms of queries and keys, and heads of a size of their own."""
    tiny = TINY["internvl"]
    reference = tiny.make(tmp_path, partial(transformers.Qwen3Config, head_dim=12))
    vlm = vlc.load(tmp_path, dtype="float32", layout="stacked")
    assert (vlm.config.decoder.family, vlm.config.decoder.qk_norm, vlm.config.decoder.head_dim) == ("qwen3", True, 12)
    forward = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))
    images, text = pictures()[1], tiny.texts[1]
    rows = [tiny.processor()(images=[images], text=[text], return_tensors="pt")]
    batch = vlm.processor(images=[images], text=[text])
    check_parity(Loaded(tiny, tmp_path, reference, vlm, batch, forward), batch, rows)
    vlc.save(vlm, tmp_path / "saved")
    assert vlc.load(tmp_path / "saved", dtype="float32").config == vlm.config


def test_chat(loaded):
    processor, image = loaded.tiny.processor(), pictures()[0][0]
    talk = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        {"role": "user", "content": [{"type": "text", "text": "w4"}, {"type": "image", "image": image}]},
    ]
    ours = loaded.vlm.processor.chat(talk)
    theirs = processor.apply_chat_template(
        [talk], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    np.testing.assert_array_equal(ours.tokens[0, : ours.lengths[0]], theirs["input_ids"][0])
    assert (ours.vision_index[0] != TEXT).any()


def test_compressed_decoding_equals_the_full_model_with_the_rest_masked_out(loaded):
    model, params, batch = loaded.vlm.model, loaded.vlm.params, loaded.batch
    logits, state = vlc.prefill(model, params, batch, vlc.VLCache(budget=0.4)).start(4)
    new, found, first = np.random.default_rng(0).integers(5, 58, (4, batch.size)).astype(np.int32), [], state
    for tokens in new:
        logits, state = vlc.decode_step(model, params, tokens, state)
        found.append(np.asarray(logits))
    kept = {layer: np.asarray(first.kept_positions(layer)) for layer in range(3)}
    assert sum((of_layer[1] >= 0).sum(axis=-1).max() for of_layer in kept.values()) < 0.5 * 3 * batch.lengths[1]
    np.testing.assert_allclose(np.stack(found), by_definition(model, params, batch, new, kept), atol=1e-4, rtol=0)


@pytest.mark.parametrize("promises", [check, *later(check_rows_alone_and_budget_one)])
def test_promises(loaded, promises):
    promises(loaded.vlm, pictures(), loaded.tiny.texts)


def test_what_is_saved_is_read_here_and_by_transformers(loaded, tmp_path):
    vlm, reference = loaded.vlm, loaded.reference
    vlc.save(vlm, tmp_path)
    again = vlc.load(tmp_path, "float32", layout="stacked")
    assert again.config == vlm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
    jax.tree.map(
        np.testing.assert_array_equal, again.processor(images=pictures(), text=loaded.tiny.texts), loaded.batch
    )
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is type(reference)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for name, value in reference.state_dict().items():
        if "post_layernorm" not in name:  # LLaVA's features are those before it
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    ours, theirs = (
        transformers.AutoImageProcessor.from_pretrained(f, backend="pil") for f in (tmp_path, loaded.folder)
    )
    assert type(ours) is type(theirs)
    a, b = (p(images=[pictures()[1]], return_tensors="pt") for p in (ours, theirs))
    for key in b:
        torch.testing.assert_close(a[key], b[key])


def test_names_of_tensors_as_transformers_has_them_in_memory(loaded, tmp_path):
    shutil.copytree(loaded.folder, tmp_path, dirs_exist_ok=True)
    tensors = {name: value.contiguous() for name, value in loaded.reference.state_dict().items()}
    assert any(name.startswith("model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, vlc.load(tmp_path, "float32", layout="stacked").params, loaded.vlm.params
    )


def test_visual_tokens_have_places_in_their_images(loaded):
    """Within the picture but for padding, as many as there are tokens; only row breaks have none."""
    vlm, batch = loaded.vlm, loaded.batch
    for row, images in enumerate(pictures()):
        regions = vlm.processor.layout.token_regions([(image.height, image.width) for image in images])
        index = batch.vision_index[row][batch.vision_index[row] != TEXT]
        assert [len(of_image) for of_image in regions] == _runs(vlm, images)
        found = np.concatenate(regions) if regions else np.zeros((0, 4))
        np.testing.assert_array_equal(np.isnan(found[:, 0]), index == NEWLINE)
        for of_image, image in zip(regions, images):
            of_image = of_image[np.isfinite(of_image[:, 0])]
            assert (of_image[:, 2:] > of_image[:, :2]).all()
            shown = (of_image[:, 2:] > 0).all(axis=1) & (of_image[:, :2] < [image.width, image.height]).all(axis=1)
            low, high = of_image[shown].min(axis=0), of_image[shown].max(axis=0)
            assert (low[:2] <= 1).all()
            assert (high[2:] >= [image.width - 1, image.height - 1]).all()
    row = jax.tree.map(lambda x: x[1:2], batch)
    ctx = vlc.compress(vlm.model, vlm.params, row, vlc.VLCache(budget=0.4))
    assert explain(pictures()[1], row, ctx, ctx.report, vlm.processor.layout).width > 0


def _runs(vlm, images):
    names = [f"{i}" for i in range(len(images))]
    return [len(image.index) for image in vlm.processor.layout.encode(images, names, vlm.processor.special_tokens)]


def test_a_training_batch_sees_what_the_prompt_does(loaded):
    vlm, row = loaded.vlm, 4
    train = make_train_batch(vlm.processor, [pictures()[row]], [loaded.tiny.texts[row]], ["w9 w8"], 128)
    batch = vlm.processor(images=[pictures()[row]], text=[loaded.tiny.texts[row]], pad_to=128)
    ours, theirs = (vlm.model.apply({"params": vlm.params}, b, method="embed").hidden for b in (train.batch, batch))
    n = int(batch.lengths[0])
    np.testing.assert_array_equal(ours[0, :n], theirs[0, :n])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_written_and_read(name, tmp_path):
    """And have the published numbers of parameters."""
    config = preset(name)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    params = family_of(config).model(config).abstract_params()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == pytest.approx(PRESETS[name], rel=1e-3)


ONEVISION, INTERN, SMOL = ({"model_type": name} for name in ("llava_onevision", "internvl", "smolvlm"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ONEVISION | {"vision_aspect_ratio": "anyres"}, 'vision_aspect_ratio is "anyres"; expected "anyres_max_9"'),
        (ONEVISION | {"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio is"),
        (ONEVISION | {"vision_feature_select_strategy": "default"}, 'expected "full": a SigLIP tower has no class tok'),
        (
            ONEVISION | {"vision_config": {"model_type": "clip_vision_model"}},
            "the supported siglip_vision_model",
        ),
        (ONEVISION | {"image_grid_pinpoints": [[384, 400]]}, "multiples of the vision image_size 384"),
        (ONEVISION | {"text_config": {"model_type": "gemma"}}, "text_config.model_type is .gemma."),
        (ONEVISION | {"video_token_index": "x"}, "video_token_index is .x."),
        ({"model_type": "internvl_chat"}, "whose name on the Hugging Face Hub ends in -hf"),
        (INTERN | {"vision_config": {"norm_type": "rms_norm"}}, "norm_type is .rms_norm.; .*38B and 78B"),
        (INTERN | {"vision_config": {"use_qk_norm": True}}, "use_qk_norm is True; expected false: the tower of 6B"),
        (INTERN | {"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling is False; expected true"),
        (INTERN | {"vision_config": {"image_size": [448, 336]}}, "image_size is .448, 336.; expected a whole number"),
        (INTERN | {"downsample_ratio": 0.4}, "downsample_ratio is 0.4; expected 1 / n, .* divides the 32 patches"),
        (INTERN | {"downsample_ratio": 0.2}, "downsample_ratio is 0.2; expected 1 / n, .* divides the 32 patches"),
        (INTERN | {"vision_feature_layer": 25}, "vision_feature_layer is 25; expected one of -25..24"),
        ({"model_type": "idefics2"}, "; this is an Idefics2: take an Idefics3 or a SmolVLM"),
        (SMOL | {"image_token_id": 7, "scale_factor": 2}, "scale_factor is 2; expected a divisor of the 7 patches"),
        (SMOL | {"image_token_id": 7, "scale_factor": 0}, "scale_factor is 0; expected a whole number"),
        (SMOL | {"vision_config": {"model_type": "siglip2"}}, "model_type is .siglip2.; expected one of the supported"),
        (SMOL | {"scale_factor": 7}, "image_token_index is 128257; expected a token id below the vocab_size 32000"),
        (INTERN | {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is .full.; expected one"),
    ],
)
def test_what_is_refused(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(vlc.CheckpointError, match=message):
        read_config(tmp_path)


def test_a_llava_onevision_whose_config_leaves_everything_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    config, theirs = read_config(tmp_path), transformers.LlavaOnevisionConfig()
    assert config.vision == preset("llava-onevision-qwen2-7b-ov").vision
    assert config.grid_pinpoints == tuple(map(tuple, theirs.image_grid_pinpoints))
    assert (config.image_token_id, config.video_token_id) == (theirs.image_token_index, theirs.video_token_index)
    assert (config.decoder.family, config.decoder.hidden_size) == ("qwen2", theirs.text_config.hidden_size)
    assert (config.feature_select, config.feature_layers, config.max_tiles) == ("full", (26,), 9)


def test_an_internvl_whose_config_leaves_everything_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(INTERN))
    config, theirs = read_config(tmp_path), transformers.InternVLConfig()
    assert config.vision == dataclasses.replace(preset("internvl3-8b").vision, qkv_bias=False)
    assert (config.image_token_id, config.token_grid**2) == (theirs.image_token_id, theirs.image_seq_length)
    assert config.decoder.family == "qwen2"


def test_grids_of_internvl_are_those_of_transformers():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    side = 448
    layout = InternLayout(preset("internvl3-8b"), ImageTransform(size=(side, side), do_center_crop=False))
    for height, width in np.random.default_rng(0).integers(1, 4000, (300, 2)).tolist():
        columns, rows = get_optimal_tiled_canvas((height, width), (side, side), 1, 12)
        assert layout.grid(height, width) == (rows, columns)
