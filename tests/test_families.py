"""A family from outside: one value, registered here, and the whole library reads, runs and writes its models."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlcache_jax as vlc
from vlcache_jax.demo.data.tokenizer import BOS, EOS, IMAGE, PAD, UNKNOWN, build_tokenizer
from vlcache_jax.explain.pictures import explain
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.decoder.config import DecoderConfig
from vlcache_jax.models.decoder.config_reader import read_decoder, read_token_ids, text_section
from vlcache_jax.models.decoder.config_writer import text_values, token_values
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.decoder.weights import decoder_rules
from vlcache_jax.models.families import registry
from vlcache_jax.models.families.family import EncodedImage, Family
from vlcache_jax.models.families.module import FamilyModule, in_order
from vlcache_jax.models.io.rules import WeightRules, linear
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.tokenizer import Tokenizer
from vlcache_jax.typing import Embedded

SIDE, GRID = 8, 2  # pixels of a patch, patches of an image's side


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchesConfig:
    """Patches straight into the decoder, between a token before and one after the image."""

    model_type: str = "tiny_patches"
    decoder: DecoderConfig
    image_token_id: int
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class Patches(FamilyModule):
    def setup(self) -> None:
        self.decoder = Decoder(self.config.decoder, self.dtype, self.remat, self.layout)
        self.patches = nn.Dense(self.config.decoder.hidden_size, dtype=self.dtype)

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        pixels = jax.ShapeDtypeStruct((rows, tiles, GRID**2, SIDE * SIDE * 3), jnp.float32)
        return Batch(ids, jax.ShapeDtypeStruct((rows,), jnp.int32), ids, pixels)

    def embed(self, batch: Batch, position_ids: Any = None) -> Embedded:
        embedded, index = self.decoder.embed(jnp.asarray(batch.tokens)), jnp.asarray(batch.vision_index)
        if not batch.pixels.shape[1]:
            return in_order(embedded, batch)
        features = self.patches(jnp.asarray(batch.pixels))
        features = features.reshape(batch.size, -1, features.shape[-1])
        visual = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return in_order(jnp.where((index == TEXT)[..., None], embedded, visual), batch)


@dataclasses.dataclass(frozen=True)
class Layout:
    config: PatchesConfig

    def encode(self, images, names, tokens):
        index = np.arange(GRID**2, dtype=np.int32)
        text = f"={tokens['image_token'] * len(index)}+"
        return [EncodedImage(self._patches(image), index, len(index), text) for image in images]

    def _patches(self, image):
        pixels = np.asarray(image.resize((GRID * SIDE, GRID * SIDE)))
        grid = pixels.reshape(GRID, SIDE, GRID, SIDE, 3).swapaxes(1, 2)
        return grid.reshape(1, GRID**2, -1)

    def normalised(self, rows, tiles):
        pixels = np.zeros((len(rows), tiles, GRID**2, SIDE * SIDE * 3), np.float32)
        for row, images in enumerate(rows):
            for number, image in enumerate(images):
                pixels[row, number] = image.pixels[0] / 127.5 - 1
        return pixels

    def token_regions(self, shapes):
        steps = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="xy"), -1).reshape(-1, 2)
        boxes = np.concatenate([steps, steps + 1], axis=1) / GRID
        return [(boxes * np.array([width, height] * 2)).astype(np.float32) for height, width in shapes]

    def files(self, image_token):
        kind = {"processor_class": "PatchesProcessor"}
        return {"preprocessor_config.json": kind, "processor_config.json": kind | {"image_token": image_token}}


def read_config(root, top):
    text = text_section(top)
    decoder = read_decoder(text, top.flag("tie_word_embeddings", False))
    tokens = read_token_ids(root, top, text, decoder.vocab_size)
    return PatchesConfig(decoder=decoder, image_token_id=top.get("image_token_id"), **tokens)


def config_values(config, dtype):
    return {
        "model_type": config.model_type,
        "dtype": dtype,
        "image_token_id": config.image_token_id,
        "text_config": text_values(config.decoder) | token_values(config),
        "tie_word_embeddings": config.decoder.tie_embeddings,
    }


FAMILY = Family(
    model_types=("tiny_patches",),
    read_config=read_config,
    config_values=config_values,
    model=Patches,
    weights=WeightRules(
        rules=(*linear("patches", "patches"), *decoder_rules("model", "lm_head")),
        rename=lambda name: name.removeprefix("old."),
    ),
    read_layout=lambda config, settings, source: Layout(config),
    image_tiles=lambda config: 1,
    refused={"big_patches": "take tiny_patches"},
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(FAMILY)


@pytest.fixture
def vlm(registered):
    backend = build_tokenizer()
    decoder = DecoderConfig(
        family="qwen2", vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128, qkv_bias=True,
    )  # fmt: skip
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD, "image_token": IMAGE}
    ids = {name: backend.token_to_id(token) for name, token in named.items()}
    config = PatchesConfig(
        decoder=decoder,
        image_token_id=ids["image_token"],
        bos_token_id=ids["bos_token"],
        pad_token_id=ids["pad_token"],
        eos_token_ids=(ids["eos_token"],),
    )
    processor = Processor(tokenizer=Tokenizer(backend, named, config.eos_token_ids), layout=Layout(config))
    model, rng = Patches(config, jnp.float32), np.random.default_rng(0)
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
    for model_type, hint in {"mllama": "", "big_patches": "; take tiny_patches"}.items():
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
        with pytest.raises(
            vlc.CheckpointError, match=f"model_type is .{model_type}.; expected one of the supported "
        ) as e:
            vlc.load(tmp_path)
        for supported in ("llava", "llava_next", "tiny_patches"):
            assert supported in str(e.value)
        assert str(e.value).endswith(hint)


def test_a_model_type_has_one_family(registered):
    registry.register(FAMILY)
    with pytest.raises(vlc.InputError, match="'llava' belongs to another family"):
        registry.register(dataclasses.replace(FAMILY, model_types=("new", "llava")))
    assert "new" not in registry.FAMILIES


def test_nothing_outside_its_folder_asks_for_a_family():
    from pathlib import Path

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
