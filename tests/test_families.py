"""The page about a family of one's own: its code runs, and the whole library reads, runs and writes its models."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.data.tokenizer import BOS, EOS, IMAGE, PAD, UNKNOWN, build_tokenizer
from vlcache_jax.explain.pictures import explain
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.families import registry
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import Tokenizer
from vlcache_jax.models.vision.config import VisionConfig

GRID = 2  # patches of an image's side
PAGE = Path(__file__).parent.parent / "docs" / "add_a_family.md"
*STEPS, REGISTER = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
page: dict[str, Any] = {"__name__": "add_a_family"}
exec(compile("\n".join(STEPS), str(PAGE), "exec"), page)
FAMILY = page["TILES"]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    exec(compile(REGISTER, str(PAGE), "exec"), page)


@pytest.fixture
def vlm(registered):
    backend = build_tokenizer()
    decoder = DecoderConfig(
        family="qwen2", vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128, qkv_bias=True,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, image_size=16, patch_size=8,
        layer_norm_eps=1e-6, activation="gelu_pytorch_tanh",
    )  # fmt: skip
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD, "image_token": IMAGE}
    ids = {name: backend.token_to_id(token) for name, token in named.items()}
    config = page["TilesConfig"](
        vision=vision,
        decoder=decoder,
        image_token_id=ids["image_token"],
        bos_token_id=ids["bos_token"],
        pad_token_id=ids["pad_token"],
        eos_token_ids=(ids["eos_token"],),
    )
    layout = page["Layout"](config, ImageTransform(size=(16, 16), do_center_crop=False))
    processor = Processor(tokenizer=Tokenizer(backend, named, config.eos_token_ids), layout=layout)
    model, rng = page["Tiles"](config, jnp.float32), np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), model.abstract_params())
    return vlc.VLM(model, params, processor, config)


def picture():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8))


def test_what_is_saved_is_loaded_and_answers(vlm, tmp_path):
    vlc.save(vlm, tmp_path)
    again = vlc.load(tmp_path, "float32")
    assert again.config == vlm.config
    stacked = again.with_layout("stacked")
    assert stacked.model == vlm.model
    jax.tree.map(np.testing.assert_array_equal, stacked.params, vlm.params)
    vlc.save(again, tmp_path)  # the same model: nothing to refuse
    batch = again.processor(images=[[picture(), picture()]], text=["user: <image> <image> hello"])
    assert (batch.vision_index[0] != TEXT).sum() == 2 * GRID**2
    assert batch.vision_index.max() == 2 * GRID**2 - 1
    np.testing.assert_array_equal(
        batch.pixels, vlm.processor(images=[[picture()] * 2], text=["<image> <image>"]).pixels
    )
    policy = vlc.VLCache(budget=0.5)
    out = vlc.generate(again.model, again.params, batch, policy, max_new_tokens=5)
    ctx = vlc.compress(again.model, again.params, batch, policy)
    assert again.processor.decode(out) == vlm.processor.decode(vlc.generate(vlm.model, vlm.params, batch, policy, 5))
    drawn = explain([picture()] * 2, batch, ctx, out.report, again.processor.layout)
    assert drawn.width == 1600


def test_a_model_type_that_nobody_reads_is_refused_with_what_is_supported(vlm, tmp_path):
    vlc.save(vlm, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for model_type, hint in {"mllama": "", "big_tiles": "; take tiny_tiles"}.items():
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
        with pytest.raises(
            vlc.CheckpointError, match=f"model_type is .{model_type}.; expected one of the supported "
        ) as e:
            vlc.load(tmp_path)
        for supported in ("llava", "llava_next", "tiny_tiles"):
            assert supported in str(e.value)
        assert str(e.value).endswith(hint)


def test_a_model_type_has_one_family(registered):
    registry.register(FAMILY)
    with pytest.raises(vlc.InputError, match="'llava' belongs to another family"):
        registry.register(dataclasses.replace(FAMILY, model_types=("new", "llava")))
    assert "new" not in registry.FAMILIES


def test_nothing_outside_its_folder_asks_for_a_family():
    import vlcache_jax

    root = Path(vlcache_jax.__file__).parent.parent
    for top in ("vlcache_jax", "models"):
        for path in (root / top).rglob("*.py"):
            parts = path.relative_to(root).parts
            if "llava" in parts or "demo" in parts or parts[:2] == ("models", "families"):
                continue
            text = path.read_text(encoding="utf-8")
            assert "model_type ==" not in text, path
            assert "model_type !=" not in text, path
            assert "families.llava" not in text, path
