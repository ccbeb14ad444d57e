"""From a Hugging Face folder to a model that answers."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.errors import InputError
from vlcache_jax.models.coding import WeightCoding, weight_coding
from vlcache_jax.models.decoder.layout import layout_of, relaid
from vlcache_jax.models.families.family import FamilyModel, ModelConfig
from vlcache_jax.models.families.registry import family_of, read_config, read_weights_scheme
from vlcache_jax.models.io.hub import find_checkpoint
from vlcache_jax.models.io.params_reader import default_device, load_params
from vlcache_jax.models.processor import Processor
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.parallel.replication import replicated, warn
from vlcache_jax.typing import Params

_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class VLM:
    """A loaded checkpoint, of whatever family.

    Attributes:
      model: the Flax module; hashable, holds no arrays.
      params: its parameters, a plain nested dict of arrays with stacked layers.
      processor: images and text to a `Batch`, tokens back to text.
      config: what the model is made of; its `model_type` says of which family.
    """

    model: FamilyModel
    params: Params
    processor: Processor
    config: ModelConfig

    def with_layout(self, layout: str) -> "VLM":
        """The same, the decoder's weights in another layout; arrays that it does not change are shared.

        Args:
          layout: "stacked" or "apart", see `load`.

        Raises:
          InputError: an unknown layout.

        Example:
          state = TrainState.create(vlm.with_layout("stacked").params, ...)
        """
        if layout == self.model.layout:
            return self
        model, params = relaid(self.params, self.model, layout)
        return dataclasses.replace(self, model=model, params=params)


def load(
    path: str | os.PathLike[str],
    dtype: Any = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    *,
    param_dtype: Any = None,
    buckets: Sequence[int] | None = None,
    image_limits: Mapping[str, Any] | None = None,
    revision: str | None = None,
    allow_links: bool = False,
    layout: str | None = None,
    weights: str | WeightCoding | None = None,
) -> VLM:
    """Loads a checkpoint of a supported family, such as LLaVA, Qwen-VL or Gemma 3; see `docs/checkpoints.md`.

    Reads `config.json`, safetensors weights and the processor's files as transformers 4 and 5 write them. Weights go
    straight from the files to their place on the mesh, slice by slice, cast on the way. No code of the checkpoint is
    run and no pickle is read.

    Args:
      path: a local folder, or the id of a model on the Hugging Face Hub, which is downloaded into the Hub's cache; see
        `docs/checkpoints.md`. A folder that exists wins; "./name" is a folder always.
      dtype: of the computation and the KV cache: "bfloat16", "float32", "float16", or such a NumPy type.
      mesh: devices to load onto, with axes of any type; projections are split over its axis "model" if it has one, and
        any other axis can carry the batch. None: the default device.
      param_dtype: of the parameters; by default that of the computation. For training take "float32": in bfloat16 most
        updates are smaller than half a step of the number and round away.
      buckets: the padded lengths that the processor gives prompts, such as (512, 1024, 2048): programs compile once for
        each that is used. None: multiples of 64 up to 512 tokens, of 256 up to 4096, then of 1024.
      image_limits: how large images become, of a model that takes any size, such as {"max_image_tokens": 1024}; see
        `Processor.from_folder`.
      revision: of a model on the Hub: a branch, tag or commit; "main" by default.
      allow_links: follow links that lead out of the folder, as in the stores of models that other programs keep.
      layout: how the decoder's weights lie: "stacked", for TPUs, meshes and training; or "apart", each layer by itself
        and projections of one input as one matrix, with which a CPU or GPU decodes about twice as fast while programs
        grow with the number of layers. Tokens are the same. None: "apart" on a CPU or GPU without a mesh if parameters
        have the dtype of the computation, as for inference, else "stacked". `VLM.with_layout` changes it.
      weights: what the projections of the decoder's layers are kept as: "int8", with a scale per output feature, half
        of bfloat16's memory; "int4", with a scale per feature and 128 input channels, a quarter of it; another
        `WeightCoding`; or "float". They are coded one tensor after another while they are read. Embeddings, output
        head, norms, projector and vision tower stay floats. None: as the checkpoint has them, the codes of an AWQ, GPTQ
        or compressed-tensors folder or floats.

    Returns:
      Model, parameters, processor and config.

    Raises:
      CheckpointError: the folder is missing, unsafe, corrupt, unsupported, its tensors do not fit its config, or the
        model cannot be downloaded.
      InputError: an unknown dtype, layout or coding of weights, the layout "apart" on a mesh, limits that contradict
        each other, or buckets that are not positive whole numbers.

    Warns:
      PlacementWarning: the mesh has several axes, or one not named for the batch, and none named "model"; or its size
        does not divide the KV heads.

    Example:
      vlm = vlc.load("llava-hf/llava-v1.6-mistral-7b-hf")
      batch = vlm.processor(images=[["cat.jpg"]], text=["[INST] <image>\\nWhat is this? [/INST]"])
      out = vlc.generate(vlm.model, vlm.params, batch, policy=vlc.VLCache(budget=0.1), max_new_tokens=64)
    """
    dtype, param_dtype = _dtype("dtype", dtype), _dtype("param_dtype", dtype if param_dtype is None else param_dtype)
    if layout is None:
        inference = mesh is None and param_dtype == dtype
        layout = "apart" if inference and default_device().platform in ("cpu", "gpu") else "stacked"
    if layout_of(layout).layers_apart and mesh is not None:
        raise InputError(f"layout={layout!r} is for one device, and a mesh was given: leave one of them out")
    folder = find_checkpoint(path, revision=revision, allow_links=allow_links)
    config = read_config(folder)
    processor = Processor.from_folder(folder, buckets=buckets, image_limits=image_limits)
    family = family_of(config)
    scheme = read_weights_scheme(folder)
    coding = scheme.coding if scheme is not None and weights is None else weight_coding(weights)
    model, plain = family.model(config, dtype, layout=layout, weights=coding), family.model(config, dtype)
    abstract = model.abstract_params()
    shardings = None
    if mesh is not None:
        shardings = param_shardings(abstract, mesh)
        warn(replicated(mesh.shape, model.spec))
    exact = weights is None and scheme is not None
    params = load_params(
        folder, plain.abstract_params(), family.weights, param_dtype, shardings, abstract, coding, scheme, exact
    )
    return VLM(model, params, processor, config)


def _dtype(argument: str, dtype: Any) -> Any:
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in _DTYPES:
        raise InputError(f"{argument}={dtype!r} is not supported: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
