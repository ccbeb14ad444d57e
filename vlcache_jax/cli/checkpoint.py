"""A checkpoint in two steps: what can be checked at once, and the weights."""

import argparse
import dataclasses
import os
from collections.abc import Mapping

import jax

from vlcache_jax.errors import InputError
from vlcache_jax.files.compilation_cache import use_compilation_cache
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import Batch
from vlcache_jax.models.families.family import FamilyModel
from vlcache_jax.models.families.registry import family_of, read_config
from vlcache_jax.models.io import loading
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.hub import find_checkpoint
from vlcache_jax.models.io.weights_folder import SafetensorsFolder
from vlcache_jax.models.processor import Processor
from vlcache_jax.terminal.progress import Progress


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """Everything of a checkpoint but its weights, of which only the headers have been read."""

    folder: CheckpointFolder
    model: FamilyModel
    processor: Processor
    dtype: str
    image_limits: Mapping[str, int]
    weights: str | None = None

    def check(self, batch: Batch, recipe: Recipe, max_new_tokens: int) -> None:
        """Raises what `prefill` would, before weights are read."""
        check_prefill(self.model.spec, batch, recipe, max_new_tokens)

    def load(self, layout: str | None = None, mesh: jax.sharding.Mesh | None = None) -> "loading.VLM":
        """Reads the weights."""
        return loading.load(
            self.folder, self.dtype, mesh, layout=layout, image_limits=self.image_limits, weights=self.weights
        )


def keep_programs(wanted: bool, progress: Progress) -> None:
    """Keeps compiled programs between runs. A folder that cannot be written costs compile time, not the run."""
    if not wanted:
        return
    try:
        use_compilation_cache()
    except InputError as error:
        progress.note(f"programs are compiled anew: {error}")


def open_checkpoint(
    source: str | os.PathLike[str],
    dtype: str | None,
    weights: str | None = None,
    *,
    revision: str | None = None,
    allow_links: bool = False,
    image_limits: Mapping[str, int] | None = None,
) -> OpenedCheckpoint:
    """Opens a checkpoint, see `vlcache_jax.load`.

    `dtype` None is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere.

    Raises CheckpointError, and InputError for the limits, as `vlcache_jax.load` does.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    folder = find_checkpoint(source, revision=revision, allow_links=allow_links)
    config = read_config(folder)
    SafetensorsFolder(folder)
    limits = image_limits or {}
    processor = Processor.from_folder(folder, image_limits=limits)
    return OpenedCheckpoint(
        folder, family_of(config).model(config, jax.numpy.dtype(dtype)), processor, dtype, limits, weights
    )


def open_asked(arguments: argparse.Namespace) -> OpenedCheckpoint:
    """Opens the checkpoint that a command's own arguments name."""
    most = arguments.max_image_tokens
    return open_checkpoint(
        arguments.model,
        arguments.dtype,
        arguments.weights,
        revision=arguments.revision,
        allow_links=arguments.allow_links,
        image_limits=None if most is None else {"max_image_tokens": most},
    )
