"""LoRA (https://arxiv.org/abs/2106.09685): beside frozen kernels, products of two narrow matrices that are trained.

    kernel [channels, features]   frozen, of any dtype, or codes (`vlc.load(..., weights="int8")`)
    lora_a [channels, rank]       drawn, as PEFT draws it
    lora_b [rank, features]       zeros: training starts from the model as it is

The adapters are a tree of their own, with the model's paths: small enough to be kept in float32, saved and exchanged by
themselves. Joined with the model's parameters (`parts.merge`) they are found by its linear layers, which add
`x @ lora_a @ lora_b`; so no kernel is ever merged during training, and none has a gradient.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from vlcache_jax.errors import InputError
from vlcache_jax.inference.context import check_count
from vlcache_jax.models.families.registry import family_of
from vlcache_jax.models.io.rules import LINEAR, WeightRules
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.training.parts import under
from vlcache_jax.training.state import Loss, Metrics, Params

ParamPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """What is adapted, and how much. Hashable.

    Attributes:
      rank: of the adapters: how many numbers they pass on.
      alpha: adapters count alpha / rank, so that another rank needs no other learning rate.
      targets: path prefixes of kernels, as of `parts.split`: ("decoder/layers/attention/query", "projector") say.
      rank_stabilised: they count alpha / sqrt(rank) (rsLoRA, https://arxiv.org/abs/2312.03732).
      dropout: which share of the numbers that go into the adapters a train step leaves out, others each time, while the
        rest counts 1 / (1 - dropout). Answers are made with all of them.

    Raises:
      InputError: a rank below 1, an alpha that is not positive, a dropout out of [0, 1), targets that are no sequence.

    Example:
      lora = Lora(rank=16, alpha=32)
      step = make_train_step(lora.loss(answer_loss(vlm.model)), optax.adamw(1e-4))
      state = init_state(lora.init(vlm.model, vlm.params), optax.adamw(1e-4))
      state, metrics = step(state, batch, vlm.params)
      tuned = dataclasses.replace(vlm, params=lora.merged(merge(vlm.params, state.params)))
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = ("decoder/layers",)
    rank_stabilised: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise InputError(f"alpha={self.alpha!r}: give a positive number")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout!r}: give a share of at least 0 and below 1")
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(f"targets={self.targets!r}: give a sequence of path prefixes, such as ('decoder/layers',)")
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """What the product of the two matrices counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def init(self, model: Any, params: Params, seed: int = 0) -> Params:
        """New adapters, float32, on the devices and the mesh of the parameters.

        Args:
          model: of `vlc.load`, its weights stacked ("stacked" layout).
          params: its parameters, or their shapes.
          seed: of what is drawn: uniform within 1 / sqrt(channels), as PEFT does.

        Raises:
          InputError: a target names no linear layer, or the weights lie apart.
        """
        kernels = self._kernels(model, params)
        rng = np.random.default_rng(seed)
        drawn: dict[ParamPath, np.ndarray] = {}
        for path, kernel in kernels.items():
            *stack, channels, features = kernel.shape
            drawn[(*path, "lora_a")] = rng.uniform(-1, 1, (*stack, channels, self.rank)) / math.sqrt(channels)
            drawn[(*path, "lora_b")] = np.zeros((*stack, self.rank, features))
        return place_adapters({path: x.astype(np.float32) for path, x in drawn.items()}, params)

    def loss(self, loss: Loss) -> Loss:
        """A loss of parameters that hold adapters, from one of parameters as the model takes them.

        With dropout it takes a random key behind the batch, as a step with a seed gives it (`make_train_step`), and
        raises InputError without.
        """

        def adapted(params: Params, batch: Any, key: jax.Array | None = None) -> tuple[jax.Array, Metrics]:
            if self.dropout and key is None:
                raise InputError(
                    f"these adapters are trained with dropout={self.dropout:g}, which is drawn: give make_train_step a "
                    "seed, or go on without, by dataclasses.replace(lora, dropout=0.0)"
                )
            return loss(self.applied(params, key), batch)

        return adapted

    def applied(self, params: Params, key: jax.Array | None = None) -> Params:
        """Parameters that hold adapters (`parts.merge`) as the model takes them: with `lora_b` times the scale.

        `vlc.generate`, the engine and whatever else runs a model take them like any others.

        Args:
          params: with adapters.
          key: of the dropout; None is no dropout.
        """
        flat = flatten_dict(params)
        keep = 1.0 if key is None else 1 - self.dropout
        added = {path: x * jnp.asarray(self.scale / keep, x.dtype) for path, x in flat.items() if path[-1] == "lora_b"}
        if key is not None and keep < 1:
            for number, path in enumerate(sorted(added)):
                stack = flat[path].shape[:-2]  # every layer draws of its own
                added[(*path[:-1], "lora_key")] = jax.random.split(jax.random.fold_in(key, number), stack)
                added[(*path[:-1], "lora_keep")] = jnp.full(stack, keep, jnp.float32)
        return unflatten_dict(flat | added)

    def merged(self, params: Params) -> Params:
        """Plain parameters: kernels with their adapters added, in the dtypes of the kernels, and no adapters.

        Raises:
          InputError: weights are codes, to which nothing can be added.
        """
        flat = flatten_dict(params)
        if coded := [path for path in flat if path[-1] == "lora_a" and (*path[:-1], "kernel") not in flat]:
            raise InputError(
                f"the weights of {'/'.join(coded[0][:-1])} are codes, to which no adapters can be added: leave them "
                'beside (`applied`), or merge them into the model loaded with weights="float"'
            )
        plain = {path: x for path, x in flat.items() if path[-1] not in ("lora_a", "lora_b")}
        for path in flat:
            if path[-1] == "lora_a":
                kernel, pair = (*path[:-1], "kernel"), (flat[path], flat[(*path[:-1], "lora_b")])
                with on_mesh_of(plain[kernel], pair):
                    plain[kernel] = _added(plain[kernel], *pair, self.scale)
        return unflatten_dict(plain)

    def _kernels(self, model: Any, params: Params) -> dict[ParamPath, Any]:
        """Kernels that are adapted, by the paths of their layers."""
        flat = flatten_dict(params)
        found = adaptable(family_of(model.config).weights, flat)
        for target in self.targets:
            if not any(under("/".join(path), target) for path in found):
                names = sorted({"/".join(path[:2]) for path in found})
                raise InputError(
                    f"target {target!r} names no linear layer of this model, which has some under {', '.join(names)}; "
                    "weights must lie stacked (vlm.with_layout('stacked'))"
                )
        chosen = [path for path in found if any(under("/".join(path), target) for target in self.targets)]
        return {path: flat.get((*path, "kernel"), flat.get((*path, "codes"))) for path in chosen}


def adaptable(weights: WeightRules, flat: dict[ParamPath, Any]) -> list[ParamPath]:
    """Paths of the linear layers among flattened parameters."""
    kernels = ((*path[:-1], "kernel") for path in flat if path[-1] in ("kernel", "codes"))
    rules = map(weights.by_path.get, kernels)
    return [rule.path[:-1] for rule in rules if rule is not None and rule.axes == LINEAR]


def place_adapters(flat: dict[ParamPath, np.ndarray], params: Params) -> Params:
    """Adapters by their paths, as a tree, where the parameters lie; adapters of split kernels are split like them."""
    adapters = unflatten_dict(flat)
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            mesh: Any = sharding.mesh
            return jax.device_put(adapters, param_shardings(adapters, mesh))
        if isinstance(sharding, jax.sharding.Sharding):
            return jax.device_put(adapters, sharding)
    return jax.tree.map(jnp.asarray, adapters)


@partial(jax.jit, static_argnames="scale")
@automatic
def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jnp.einsum("...cr,...rf->...cf", a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
