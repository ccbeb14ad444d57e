"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, a projector and a decoder.

They differ only in how images become tiles and where each visual token takes its feature from; the processor works
that out on the host (`Batch.vision_index`), so the model is one gather for all of them. LLaVA-OneVision shrinks
large maps of features: there a token is a weighted sum of four (`Batch.blend_index`).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlcache_jax.files.exporting import static_field
from vlcache_jax.inputs import NEWLINE, TEXT, Batch
from vlcache_jax.models.decoder.decoder import Decoder
from vlcache_jax.models.families.module import FamilyModule, abstract_tiles, features_in_order, in_order
from vlcache_jax.models.families.projector import Projector
from vlcache_jax.models.vision.clip import ClipVisionTower
from vlcache_jax.models.vision.patch_attention import patch_attention
from vlcache_jax.models.vision.patch_entropy import patch_entropy
from vlcache_jax.models.vision.siglip import SiglipVisionTower
from vlcache_jax.typing import Embedded, TowerView


@static_field
class Llava(FamilyModule):
    """A LLaVA as a Flax Linen module; its `config` is a `LlavaConfig`. See `FamilyModule`."""

    def setup(self) -> None:
        c = self.config
        tower = ClipVisionTower if c.vision_type == "clip_vision_model" else SiglipVisionTower
        self.vision = tower(c.vision, self.dtype)
        self.projector = Projector(c.decoder.hidden_size, c.projector_activation, c.projector_bias, dtype=self.dtype)
        self.decoder = Decoder(c.decoder, self.dtype, self.remat, self.layout, self.weights)
        if c.grid_pinpoints:
            self.image_newline = self.param(
                "image_newline", nn.initializers.normal(0.02), (c.decoder.hidden_size,), jnp.float32
            )

    @property
    def vision_grid(self) -> int:
        """Patches along one side of a tile; 0 where a class token comes first."""
        return 0 if self.config.has_class_token else self.config.vision.grid_size

    def abstract_batch(self, rows: int, length: int, tiles: int) -> Batch:
        """A batch of `jax.ShapeDtypeStruct`s: `rows` prompts of `length` tokens and `tiles` tiles."""
        batch = abstract_tiles(rows, length, tiles, self.config.vision.image_size)
        if self.config.max_tiles is None or not tiles:
            return batch
        index, weights = (jax.ShapeDtypeStruct((rows, length, 4), dtype) for dtype in (jnp.int32, jnp.float32))
        return dataclasses.replace(batch, blend_index=index, blend_weights=weights)  # type: ignore[arg-type]

    def encode_images(self, pixels: jax.Array, position_ids: jax.Array | None = None) -> jax.Array:
        """Tiles f32 [n, height, width, 3] -> projected features [n, features, decoder hidden]."""
        features = self.vision(pixels, self.config.feature_layers, position_ids)
        if self.config.feature_select == "default":  # of CLIP alone
            features = features[:, 1:]  # without the class token
        return self.projector(features)

    def project_features(self, features: jax.Array) -> jax.Array:
        """`TowerView.features` [..., channels] -> [..., decoder hidden]."""
        return self.projector(features)

    @property
    def tower_attention(self) -> str | None:
        if self.config.has_class_token or not self.config.feature_layers[-1]:
            return None
        return "class" if self.config.vision_type == "clip_vision_model" else "mean"

    def _view_images(self, pixels: jax.Array, position_ids: jax.Array | None) -> tuple[jax.Array, TowerView]:
        """`encode_images`, and what the tower says of the features: [n, features, ...]."""
        c, has_class = self.config, self.tower_attention == "class"
        layer = c.feature_layers[-1] - 1  # whose output they are
        states = self.vision(pixels, (*c.feature_layers, layer), position_ids)
        features, entered = states[..., : -c.vision.hidden_size], states[..., -c.vision.hidden_size :]
        weights = jax.tree.map(lambda x: x[layer], self.vision.variables["params"]["layers"])
        attention, keys = patch_attention(c.vision, weights, entered, has_class)
        features = features[:, 1:] if has_class else features
        entropy = patch_entropy(pixels, c.vision.patch_size, c.vision_type == "clip_vision_model")
        return self.projector(features), TowerView(attention, keys, features, entropy)

    def embed(self, batch: Batch, position_ids: jax.Array | None = None, tower: bool = False) -> Embedded:
        """Token and image embeddings in prompt order, one position after another; `tower`: with a `TowerView`."""
        embedded = self.decoder.embed(jnp.asarray(batch.tokens))
        rows, tiles = batch.pixels.shape[:2]
        if tiles == 0:
            return dataclasses.replace(in_order(embedded, batch), tower=self._no_view(batch) if tower else None)
        pixels, view = jnp.asarray(batch.pixels).reshape(rows * tiles, *batch.pixels.shape[2:]), None
        if tower:
            features, view = self._view_images(pixels, position_ids)
            attention, entropy = (
                features_in_order(x[..., None], batch)[..., 0] for x in (view.attention, view.entropy)
            )
            keys, of_features = (features_in_order(x, batch) for x in (view.keys, view.features))
            view = TowerView(attention, keys, of_features, entropy)
        else:
            features = self.encode_images(pixels, position_ids)
        index, visual = jnp.asarray(batch.vision_index), features_in_order(features, batch)
        if self.config.grid_pinpoints:
            visual = jnp.where((index == NEWLINE)[..., None], self.image_newline.astype(self.dtype), visual)
        embedded = jnp.where((index == TEXT)[..., None], embedded, visual)
        return dataclasses.replace(in_order(embedded, batch), tower=view)

    def _no_view(self, batch: Batch) -> TowerView:
        vision, shape = self.config.vision, batch.tokens.shape
        sizes = vision.hidden_size // vision.num_heads, len(self.config.feature_layers) * vision.hidden_size
        keys, features = (jnp.zeros((*shape, size), self.dtype) for size in sizes)
        return TowerView(jnp.zeros(shape, jnp.float32), keys, features, jnp.zeros(shape, jnp.float32))
