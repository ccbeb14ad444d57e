"""Videos: as an input, from frames and files, and Qwen-VL's against transformers."""

import dataclasses
import json
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from processing_checkpoint import write_checkpoint
from tiny_qwen import IMAGE, SHOWN, VIDEO, VIDEO_TEXTS, clips, image_processor, make_tiny_qwen, pictures

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.engine.buckets import Bucket, fit
from vlcache_jax.evaluation.samples import read_samples
from vlcache_jax.evaluation.tasks import task_by_name
from vlcache_jax.explain.pictures import explain
from vlcache_jax.explain.shown import MOST_FRAMES, shown
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.models.processor import Processor

ROOT = Path(__file__).parents[1]
EXPECTED = json.loads((ROOT / "tests/expected_videos.json").read_text())
NEW = 32


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in EXPECTED}
    return {kind: (folder, make_tiny_qwen(folder, kind)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return {kind: vlc.load(folder, dtype="float32") for kind, (folder, _) in checkpoints.items()}


def visuals():
    first, second = (vlc.Video(clip, fps=2.0) for clip in clips())
    return [[first], [pictures()[0], first, second]]


def reference_pixels(name):
    """What transformers' models take, from its image processor: that of videos needs torchvision."""
    images = dict(image_processor()(pictures()[:1], return_tensors="pt")) if "image" in name else {}
    pairs, grids = [], []
    for clip in clips()[: 2 if "two" in name else 1]:
        made = [image_processor()(Image.fromarray(frame), return_tensors="pt") for frame in [*clip, *clip[-1:]]]
        (_, *sides), of_frames = made[0]["image_grid_thw"][0], [x["pixel_values"].reshape(-1, 3, 2, 16) for x in made]
        for a, b in zip(of_frames[0 : len(clip) : 2], of_frames[1::2]):
            pairs.append(torch.stack([a[:, :, 0], b[:, :, 0]], dim=2).flatten(1))
        grids.append([(len(clip) + 1) // 2, *sides])
    return images | {"pixel_values_videos": torch.cat(pairs), "video_grid_thw": torch.tensor(grids)}


@pytest.mark.parametrize("kind", EXPECTED)
def test_ids_and_positions_are_those_of_transformers_4(loaded, kind):
    vlm = loaded[kind]
    batch = vlm.processor(images=visuals(), text=list(VIDEO_TEXTS.values()))
    embedded = vlm.model.apply({"params": vlm.params}, batch, method="embed")
    for row, want in enumerate(EXPECTED[kind].values()):
        n = batch.lengths[row]
        np.testing.assert_array_equal(batch.tokens[row, :n], want["ids"])
        np.testing.assert_array_equal(embedded.positions[row, :, :n], want["positions"])
        assert embedded.next_position[row] == want["next_position"]
        assert (batch.vision_index[row, :n] >= 0).sum() == np.isin(want["ids"], (IMAGE, VIDEO)).sum()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_parity(checkpoints, loaded, kind):
    """Logits at every position and greedy tokens, with the positions of version 4."""
    vlm, reference = loaded[kind], checkpoints[kind][1]
    batch = vlm.processor(images=visuals(), text=list(VIDEO_TEXTS.values()))
    logits = jax.jit(lambda p, b: vlm.model.apply({"params": p}, b, method="forward"))(vlm.params, batch)
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), NEW, eos_token_ids=[])
    for row, (name, want) in enumerate(EXPECTED[kind].items()):
        ids, positions = list(want["ids"]), np.asarray(want["positions"])
        following, pixels = want["next_position"] + np.arange(NEW), reference_pixels(name)
        for step in range(NEW if row else 1):
            where = np.concatenate([positions, np.tile(following[:step], (3, 1))], axis=1)
            tensors = {"input_ids": torch.tensor([ids]), "position_ids": torch.from_numpy(where[:, None])}
            with torch.no_grad():
                found = reference(**tensors, **pixels).logits[0].numpy()
            if step == 0:
                np.testing.assert_allclose(logits[row, : len(ids)], found, atol=1e-4, rtol=0)
                assert np.abs(found).max() > 1
            ids.append(int(found[-1].argmax()))
        np.testing.assert_array_equal(out.tokens[row, : NEW if row else 1], ids[len(want["ids"]) :])


def test_time_is_counted_in_seconds_and_cut_off_behind_the_product(loaded):
    """Half a second a pair: 0, 1, 2 steps of tokens_per_second 2, not 0, 0, 0 as where seconds are cut off first."""
    config, layout = loaded["qwen2_5_vl"].config, loaded["qwen2_5_vl"].processor.layout
    assert config.tokens_per_second == 2
    tokens = loaded["qwen2_5_vl"].processor.special_tokens
    for fps, steps in ((4, [0, 1, 2]), (8, [0, 0, 1]), (3, [0, 1, 2]), (2, [0, 2, 4]), (30, [0, 0, 0])):
        encoded = layout.encode_video(vlc.Video(clips()[0], fps=fps), "the video", tokens)
        assert np.unique(encoded.cells[:, 0]).tolist() == [0, 1, 2]
        assert encoded.cells[:: len(encoded.cells) // 3, 1].tolist() == steps
    late = vlc.Video(clips()[0], times=np.arange(5) / 4 + 100)
    assert layout.encode_video(late, "the video", tokens).cells[:, 1].max() == 2


def test_positions_where_time_stands_still_and_images_lie_side_by_side(loaded):
    """Frames of one time are of one video; images without a text between them are not."""
    vlm, quick = loaded["qwen2_5_vl"], vlc.Video(clips()[0], fps=30)
    both = [quick, Image.fromarray(clips()[0][0]), quick]
    batch = vlm.processor(images=[both], text=["w1 <|video_pad|><|image_pad|><|video_pad|> w2"])
    embedded = vlm.model.apply({"params": vlm.params}, batch, method="embed")
    grid = np.indices((2, 3)).reshape(2, -1)
    height = [0, *np.tile(grid[0] + 1, 3), *(grid[0] + 4), *np.tile(grid[0] + 7, 3), 10]
    width = [0, *np.tile(grid[1] + 1, 3), *(grid[1] + 4), *np.tile(grid[1] + 7, 3), 10]
    time = [0, *[1] * 18, *[4] * 6, *[7] * 18, 10]
    np.testing.assert_array_equal(embedded.positions[0, :, : batch.lengths[0]], [time, height, width])
    assert embedded.next_position[0] == 11


def test_tokens_around_a_video_of_qwen3_vl(loaded):
    """transformers 4 takes them away, 5 leaves them."""
    processor = loaded["qwen3_vl"].processor
    rules = processor.layout.videos
    rows = []
    for wrapper in ("v4", "v5"):
        layout = dataclasses.replace(processor.layout, videos=dataclasses.replace(rules, wrapper=wrapper))
        other = type(processor)(tokenizer=processor.tokenizer, layout=layout, image_token="<|image_pad|>",
                                special_tokens=processor.special_tokens)  # fmt: skip
        batch = other(images=visuals()[:1], text=[VIDEO_TEXTS["a video between texts"]])
        rows.append(batch.tokens[0, : batch.lengths[0]].tolist())
    start, end = rows[0].index(61), len(rows[0]) - 2
    assert rows[1] == [*rows[0][:start], 3, *rows[0][start:end], 4, *rows[0][end:]]


def test_frames_that_are_compressed(loaded):
    vlm = loaded["qwen3_vl"]
    batch = vlm.processor(images=visuals(), text=list(VIDEO_TEXTS.values()))
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.VLCache(budget=0.3), 4, eos_token_ids=[])
    assert out.tokens.shape == (2, 4)
    assert out.report.state_bytes < vlc.prefill(vlm.model, vlm.params, batch, vlc.FullCache()).report.state_bytes / 2


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_saved_rules_are_read_again(loaded, kind, tmp_path):
    vlc.save(loaded[kind], tmp_path)
    again = vlc.load(tmp_path, dtype="float32")
    assert again.processor.layout == loaded[kind].processor.layout
    assert again.processor.special_tokens["video_token"] == "<|video_pad|>"


def test_chat(loaded):
    processor, (first, second) = loaded["qwen3_vl"].processor, clips()
    want = processor(
        images=[visuals()[0] + visuals()[1][2:]], text=[f"<|im_start|> user {SHOWN} {SHOWN} w1 <|im_end|> "]
    )
    frames = [Image.fromarray(frame) for frame in second]
    for parts, beside in (
        ([{"type": "video", "video": vlc.Video(first, fps=2)}, {"type": "video", "video": frames, "fps": 2}], None),
        ([{"type": "video"}, {"type": "video", "video": second, "times": [0, 0.5, 1, 1.5]}], [vlc.Video(first, fps=2)]),
    ):
        message = {"role": "user", "content": [*parts, {"type": "text", "text": "w1"}]}
        batch = processor.chat([message], images=beside, add_generation_prompt=False)
        jax.tree.map(np.testing.assert_array_equal, batch, want)


def test_the_size_of_a_conversation(loaded):
    processor, (first, _) = loaded["qwen3_vl"].processor, visuals()[0] * 2
    content = [{"type": "image"}, {"type": "video", "video": first}, {"type": "text", "text": "w1"}]
    talk, images = [{"role": "user", "content": content}], [pictures()[0]]
    batch = processor.chat(talk, images=images)
    (size,) = processor.measure(images, conversations=talk)
    assert (size.tokens, size.bucket) == (batch.lengths[0], (batch.length, batch.pixels.shape[1]))
    assert sum(size.images) == (batch.vision_index >= 0).sum()
    assert len(size.images) == 2


def test_limits_hold_for_long_images(checkpoints):
    processor = Processor.from_folder(checkpoints["qwen3_vl"][0], image_limits={"max_image_tokens": 8})
    long = Image.new("RGB", (1590, 8))
    with pytest.raises(vlc.InputError, match=r"row 0, image 0 is 1590 x 8 pixels, .* 39 visual tokens, where 8"):
        processor(images=[[long]], text=["<|image_pad|>"])
    shorter = long.resize((64, 8))
    assert processor.measure([[shorter]], ["<|image_pad|>"])[0].images == (8,)


@pytest.mark.parametrize("frames", [5, 60])
def test_a_picture_of_a_video(loaded, frames):
    """Its frames side by side, the first of each pair; of many some, evenly spread; their kept tokens lit."""
    vlm = loaded["qwen3_vl"]
    video = vlc.Video(np.random.default_rng(0).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8), fps=2.0)
    images = [pictures()[0], video]
    prompts, regions = shown(images, vlm.processor.layout)
    assert [picture.size for picture in prompts] == [(50, 40), *[(24, 16)] * min(-(-frames // 2), MOST_FRAMES)]
    text = "<|vision_start|><|image_pad|><|vision_end|>" + SHOWN
    batch = vlm.processor(images=[images], text=[text])
    assert sum(map(len, regions)) == (batch.vision_index >= 0).sum()
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in regions]
    np.testing.assert_allclose([np.nansum(x) for x in areas], [p.width * p.height for p in prompts], rtol=1e-5)
    lengths = batch.lengths[0]
    kept = [np.arange(lengths - 8, lengths)[None]]  # the end of the last frame
    report = types.SimpleNamespace(
        policy="vl_cache", budget=0.1, kept_fraction=[0.1], state_bytes=1, full_bytes=2, prompt_lengths=[lengths]
    )
    drawn = explain(images, batch, kept, report, vlm.processor.layout)
    other = explain(images, batch, [np.arange(8)[None]], report, vlm.processor.layout)
    assert drawn.size == other.size
    assert (np.asarray(drawn) != np.asarray(other)).any()
    with pytest.raises(vlc.InputError, match="the 1 images have 30 visual tokens, row 0 of the batch has"):
        explain(images[:1], batch, kept, report, vlm.processor.layout)


def test_the_command_line(checkpoints, tmp_path, capsys):
    write(tmp_path / "a.mp4", 25)
    pictures()[0].save(tmp_path / "b.png")
    files = ["--video", str(tmp_path / "a.mp4"), "--image", str(tmp_path / "b.png")]
    options = ["--frames", "3", "--max-image-tokens", "8", "--max-new-tokens", "4", "--dtype", "float32", "--json"]
    command = ["generate", "--model", str(checkpoints["qwen3_vl"][0]), *files, "--prompt", "w1 w2", *options]
    assert main([*command, "--no-compilation-cache", "--explain", str(tmp_path / "kept.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    processor = Processor.from_folder(checkpoints["qwen3_vl"][0], image_limits={"max_image_tokens": 8})
    parts = [{"type": "video", "video": str(tmp_path / "a.mp4"), "num_frames": 3}, {"type": "image", "image": files[3]}]
    batch = processor.chat([{"role": "user", "content": [*parts, {"type": "text", "text": "w1 w2"}]}])
    assert found["visual_tokens"] == (batch.vision_index >= 0).sum() == 2 * 12 + 6
    assert found["prompt_tokens"] == batch.lengths[0]
    assert load_image(tmp_path / "kept.png").width == 1600


def write(path, frames, rate=10):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in range(frames):
            image = np.full((32, 48, 3), 8 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_files(loaded, tmp_path):
    write(tmp_path / "a.mp4", 25)
    processor = loaded["qwen3_vl"].processor
    video = vlc.Video.from_file(tmp_path / "a.mp4", processor.sampling)
    assert np.allclose(
        video.times, [0, 0.6, 1.2, 1.8, 2.4][: len(video.times)] if len(video.times) == 5 else [0, 0.8, 1.6, 2.4]
    )
    levels = [frame.mean() / 8 for frame in video.frames]
    np.testing.assert_allclose(levels, np.asarray(video.times) * 10, atol=0.7)
    content = [{"type": "video", "video": str(tmp_path / "a.mp4"), "num_frames": 3}, {"type": "text", "text": "w1"}]
    batch = processor.chat([{"role": "user", "content": content}])
    assert np.unique(batch.cells[batch.cells[..., 0] >= 0][:, 0]).tolist() == [0, 1]
    every = vlc.Video.from_file(str(tmp_path / "a.mp4"), dataclasses.replace(processor.sampling, fps=None))
    assert len(every.frames) == 25
    np.testing.assert_allclose(every.sampled(processor.sampling).times, video.times)


def test_the_page(loaded, tmp_path, monkeypatch):
    """The code of docs/inputs.md on videos runs as it is written."""
    write(tmp_path / "cat.mp4", 25)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/inputs.md").read_text("utf-8"), re.M | re.S)
    names = {"vlc": vlc, "vlm": loaded["qwen3_vl"], "frames": clips()[0]}
    exec(code, names)
    assert names["batch"].cells[..., 0].max() == 2


def test_what_the_processor_refuses(loaded, tmp_path):
    processor, (video, *_) = loaded["qwen3_vl"].processor, visuals()[0]
    sizes = vlc.Video([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 24, 3), np.uint8)], fps=1)
    (tmp_path / "a.txt").write_text("no video")
    long = vlc.Video(np.zeros((2, 8, 1700, 3), np.uint8), fps=1)
    for images, text, message in (
        ([[video]], "w1", "row 0: the prompt holds 0 video tokens '<.video_pad.>', but 1 videos were given"),
        ([[]], "<|video_pad|>", "holds 1 video tokens .* but 0 videos"),
        ([[video, pictures()[0]]], "<|image_pad|><|video_pad|>", "are not in the order of their tokens"),
        ([[sizes]], SHOWN, "row 0, video 0, frame 1 is 24 x 16 pixels, frame 0 16 x 16: give frames of one size"),
        ([[long]], SHOWN, "row 0, video 0 is 1700 x 8 pixels: one side is more than 200 times the other"),
    ):
        with pytest.raises(vlc.InputError, match=message):
            processor(images=images, text=[text])
    for part, message in (
        ({"video": str(tmp_path / "none.mp4")}, "none.mp4' is not a file"),
        ({"video": str(tmp_path / "a.txt")}, "a.txt' cannot be read"),
        ({"video": str(tmp_path / "a.txt"), "fps": "many"}, "is no sampling"),
        ({"video": str(tmp_path / "a.txt"), "num_frames": 0}, "is no sampling"),
        ({"video": clips()[0]}, "give either times= .* or fps="),
        ({"video": video, "fps": 2}, "is a video part with the keys"),
        ({"fps": 2}, "is a video part with the keys"),
    ):
        with pytest.raises(vlc.InputError, match=message):
            processor.chat([{"role": "user", "content": [{"type": "video"} | part]}])


def test_a_model_without_videos(tmp_path):
    write_checkpoint(tmp_path)
    processor, video = Processor.from_folder(tmp_path), visuals()[0][0]
    assert processor.sampling is None
    with pytest.raises(vlc.InputError, match="row 0, image 0 is a video, but this model takes none"):
        processor(images=[[video]], text=["<image>"])
    with pytest.raises(vlc.InputError, match="resizes images to sizes of its own: leave image_limits out"):
        Processor.from_folder(tmp_path, image_limits={"max_image_tokens": 8})
    with pytest.raises(vlc.InputError, match="'video' is not supported"):
        processor.chat([{"role": "user", "content": [{"type": "video", "video": video}]}])


@pytest.mark.thorough
def test_the_engine_answers_as_single_runs_do(loaded):
    """Videos beside images and plain text: buckets of their own, each row as if it were alone."""
    vlm, policy, still = loaded["qwen2_5_vl"], vlc.VLCache(budget=0.4), "<|vision_start|><|image_pad|><|vision_end|> w5"
    asked = [(visuals()[1], VIDEO_TEXTS["an image and two videos"]), (visuals()[0], f"w9 {SHOWN}")]
    more = [([], "w1 w2 w3"), ([pictures()[3]], still)]
    requests = [vlc.Request(prompt=text, images=own, eos_token_ids=[]) for own, text in asked + more]
    engine = vlc.Engine(vlm, policy, rows=2, max_new_tokens=8, prefill_rows=2, buckets=[(64, 64), (128, 256, 2)])
    results = list(engine.run(requests, ordered=True))
    assert all(result.ok for result in results), results
    for result, (own, text) in zip(results, asked):
        row = vlm.processor(images=[own], text=[text], pad_to=128, pad_tiles_to=256)
        single = vlc.generate(vlm.model, vlm.params, row, policy, 8, eos_token_ids=[])
        np.testing.assert_array_equal(result.tokens, single.tokens[0])


def test_buckets_of_videos():
    """Plain text joins the images, or the videos where there are none."""
    text, image, video = Bucket(60, 0), Bucket(200, 32), Bucket(100, 64, 2)
    assert fit([video, text, image], 6) == (Bucket(64, 0), Bucket(128, 64, 2), Bucket(256, 32))
    assert fit([video, text], 6) == (Bucket(64, 0, 2), Bucket(128, 64, 2))
    assert fit([text], 6) == (Bucket(64, 0),)
    assert Bucket(128, 64, 2).holds(text)
    assert not Bucket(256, 64, 2).holds(image)


def test_samples_with_videos(loaded, tmp_path):
    write(tmp_path / "a.mp4", 25)
    (tmp_path / "data.jsonl").write_text('{"video": "a.mp4", "question": "w1", "answer": "w2"}\n')
    (sample,) = read_samples([tmp_path / "data.jsonl"])
    processor = loaded["qwen3_vl"].processor
    request = task_by_name("jsonl").request(sample, processor)
    content = [{"type": "video", "video": str(tmp_path / "a.mp4")}, {"type": "text", "text": "w1"}]
    assert request.prompt == [{"role": "user", "content": content}]
    assert processor.chat(request.prompt).cells[..., 0].max() == 2
    with pytest.raises(vlc.InputError, match="the sample '1' has videos, but the checkpoint no chat template"):
        task_by_name("jsonl").request(sample, types.SimpleNamespace(has_chat_template=False, image_token=""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 10, "longest_edge": 5}}, "at least 10 pixels and at most 5"),
        ({"max_pixels": 7}, "size.longest_edge = 3000 and max_pixels = 7 are the same limit"),
        ({"fps": -1}, "are no sampling"),
        ({"min_frames": "few"}, "are no sampling"),
        ({"cap_pixels_per_frame": "yes"}, "expected true or false"),
        ({"temporal_patch_size": 3}, "temporal_patch_size = 3, but the vision tower"),
    ],
)
def test_settings_that_are_refused(checkpoints, tmp_path, change, message):
    for path in checkpoints["qwen3_vl"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(vlc.CheckpointError, match=f"video_preprocessor_config.json: .*{message}"):
        vlc.load(tmp_path, dtype="float32")
