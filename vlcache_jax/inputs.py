"""What a processor hands to a model: token ids, pixels, and where each visual token takes its features from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.files.exporting import exportable

Array = jax.Array | np.ndarray

TEXT = -1
"""`Batch.vision_index` of a text token or of padding."""
NEWLINE = -2
"""`Batch.vision_index` of a learned row-break embedding (LLaVA-NeXT's `image_newline`)."""


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A right-padded batch of prompts with their images. A pytree; every array has the batch as its first axis.

    Rows are independent of one another, pixels included, so a batch can be split over devices along axis 0.

        tokens        <s> USER : <im> <im> <im> <im> What is this ? <pad> <pad>
        vision_index   -1  -1 -1    0    1    2   -2   -1 -1   -1 -1    -1    -1
        lengths       11 (the true length: padding is not counted)

    Attributes:
      tokens: i32 [batch, length]. Image placeholders are already repeated, one token for each visual feature.
      lengths: i32 [batch]. True prompt lengths, 1 <= lengths <= length.
      vision_index: i32 [batch, length]. For a visual token the index of its feature among the row's features
        (`tile * features_per_tile + feature`), `NEWLINE` for a row-break embedding, `TEXT` elsewhere.
      pixels: f32 [batch, tiles, height, width, 3]. Normalised image tiles; rows with fewer tiles are padded
        with zeros that no `vision_index` refers to. `tiles` is 0 for a batch without images. Of a model that takes
        images of any size [batch, patches, channels of a patch], all images of a row one after another; a patch has
        as many frames as the model takes at once if one of the batch is a video, else one.
      cells: i32 [batch, patches, 4], where each of such patches lies: number of its frame (of a video; an image is one)
        within the row, time, row and column in the frame's grid. Between images or videos one number of a frame is left
        out. The frame is -1 in padding. None of tiles.
      blend_index, blend_weights: i32 and f32 [batch, length, 4], of models that shrink maps of features: the features
        that a visual token is a weighted sum of, counted as in `vision_index`, which names the nearest. None of others.
    """

    tokens: Array
    lengths: Array
    vision_index: Array
    pixels: Array
    cells: Array | None = None
    blend_index: Array | None = None
    blend_weights: Array | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Padded prompt length (the bucket)."""
        return self.tokens.shape[1]

    @property
    def vision_mask(self) -> jax.Array:
        """bool [batch, length]: True where the token is visual (row-break embeddings included)."""
        return jnp.asarray(self.vision_index) != TEXT


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
    """Text that goes on where prompts end: questions to a compressed context, or what a user says next. A pytree.

    The leading axes, [rows] or [rows, questions], say what belongs to which row of the context: flattened, equally many
    consecutive entries for each row.

    Attributes:
      tokens: i32 [..., length], right-padded.
      lengths: i32 [...]. True lengths, 1 <= lengths <= length.
    """

    tokens: Array
    lengths: Array
