"""Writes expected_videos.json: token ids and positions that transformers 4.57 gives to prompts with videos.

Version 5 places the text behind a video of Qwen2.5-VL elsewhere, and wraps the frames of Qwen3-VL once more. The models
were trained with what version 4 does. Run it in an environment of its own, with transformers 4.57.3 and torchvision:

    python tests/expected_videos.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tiny_qwen import IMAGE, LIMITS, PATCH, VIDEO, VIDEO_TEXTS, backend, clips, pictures

VISION = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
FPS = 2.0
KINDS = {
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", "qwen2_vl"),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", "qwen2_5_vl"),
    "qwen3_vl": ("Qwen3VL", "Qwen3VL", "qwen3_vl"),
}


def expected(kind, text):
    name, of_video, module = KINDS[kind]
    tokenizer = transformers.Qwen2TokenizerFast(tokenizer_object=backend(), eos_token="<|im_end|>")
    # Version 4 takes no notice of `size` where it has min_pixels and max_pixels of its own.
    sizes = {"size": LIMITS, "patch_size": PATCH}
    pixels = {"min_pixels": LIMITS["shortest_edge"], "max_pixels": LIMITS["longest_edge"]}
    processor = getattr(transformers, f"{name}Processor")(
        transformers.Qwen2VLImageProcessor(**sizes, **pixels),
        tokenizer,
        getattr(transformers, f"{of_video}VideoProcessor")(**sizes),
    )
    videos = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips()][: text.count("<|video_pad|>")]
    metadata = [
        {"fps": FPS, "total_num_frames": len(clip), "frames_indices": list(range(len(clip)))} for clip in videos
    ]
    images = pictures()[:1] if "<|image_pad|>" in text else None
    options = {"fps": FPS} if kind == "qwen2_5_vl" else {}
    inputs = processor(
        images=images, text=[text], videos=videos, video_metadata=metadata, do_sample_frames=False, return_tensors="pt",
        **options,
    )  # fmt: skip
    modeling = getattr(transformers.models, module)
    model = getattr(getattr(modeling, f"modeling_{module}"), f"{name}Model")
    config = SimpleNamespace(**IDS, vision_config=SimpleNamespace(**VISION))
    seconds = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if kind == "qwen2_5_vl" else {}
    positions, delta = model.get_rope_index(
        SimpleNamespace(config=config), inputs["input_ids"], inputs.get("image_grid_thw"), inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"], **seconds,
    )  # fmt: skip
    ids = inputs["input_ids"][0].tolist()
    return {"ids": ids, "positions": positions[:, 0].tolist(), "next_position": len(ids) + int(delta)}


if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    found = {kind: {name: expected(kind, text) for name, text in VIDEO_TEXTS.items()} for kind in KINDS}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found).replace("}, ", "},\n") + "\n")
