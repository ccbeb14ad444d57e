"""The train state and the train step."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from vlcache_jax.errors import InputError
from vlcache_jax.parallel.mesh import automatic, on_mesh_of
from vlcache_jax.training.parts import Params, merge

Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]
"""(params, batch) -> (loss f32 [], metrics); one that draws numbers takes a random key behind the batch."""


class TrainState(NamedTuple):
    """Everything an update needs and changes: a pytree, donated to the step.

    Attributes:
      params: those that are trained; frozen ones lie beside it and are in no file of it.
      opt_state: the optimizer's.
      step: i32 []; updates done.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A new train state around the trainable `params` (which the first step donates: keep a copy if you need one).

    Raises InputError if some are codes (`vlc.load(..., weights=...)`), which have no gradient.
    """
    for path, leaf in flatten_dict(params, sep="/").items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"{path} holds codes of weights ({leaf.dtype}), which cannot be trained: train adapters beside them "
                '(Lora), parts of the model that are floats, or load it with weights="float"'
            )
    rest, home = (optimizer.init(params), jnp.zeros((), jnp.int32)), _home(jax.tree.leaves(params))
    if home is not None:
        rest = jax.tree.map(lambda x: x if _committed(x) else jax.device_put(x, home), rest)
    return TrainState(params, *rest)


def _home(params: Sequence[Any]) -> Sharding | None:
    """Where a step returns what has no place of its own, such as counts: if they lay elsewhere, the second step would
    compile anew. None while tracing, or where the parameters are in no one place."""
    if not all(_committed(x) for x in params):
        return None
    shardings = [x.sharding for x in params]
    places = {NamedSharding(x.mesh, PartitionSpec()) if isinstance(x, NamedSharding) else x for x in shardings}
    place = next(iter(places), None)
    return place if len(places) == 1 and isinstance(place, NamedSharding | SingleDeviceSharding) else None


def _committed(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "committed", False)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    seed: int | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted `step(state, batch, frozen=None, scale=1.0) -> (state, metrics)`.

    It follows the sharding of what it is given: with the batch split over a mesh axis and the parameters replicated
    or split, XLA inserts the collectives, and the result is that of one device.

    Args:
      loss: what to minimise, see `vlcache_jax.training.loss.answer_loss`. Batches are weighted by the metric
        "weight" when gradients are accumulated, if the loss reports one.
      optimizer: any optax transformation; put clipping and the schedule into it.
      accumulate: split the batch's leading axis into so many parts and sum their gradients; the leading axis of
        every array of the batch must be a multiple of it. A part takes every `accumulate`-th row, so that those of a
        batch that is split over devices stay where they are.
      seed: of a loss that draws numbers: it is given a key of the step, or of a part of it, so that a run that goes on
        from a saved state draws what it would have drawn. None for others.

    Warns, once, if trainable parameters are bfloat16 or float16: most updates at usual rates are smaller than half a
    step of such a number, and round away. Keep them in float32 (`vlcache_jax.load(..., param_dtype="float32")`); the
    model computes in its own dtype all the same.

    Returns:
      The step. `state` is donated. `frozen` are the parameters that are not trained (`parts.split`): the loss gets
      both as one tree, nothing is differentiated for them and they are not donated. `scale` multiplies the update: a
      learning-rate schedule that is decided while training runs; others are optax's. Metrics are the loss's own and
      "loss", "gradient_norm". It raises InputError for a batch whose rows cannot be divided into the parts.

    Raises:
      InputError: accumulate is no whole number of at least 1.

    Example:
      tuned, frozen = split(vlm.params, ("decoder", "projector"))
      step = make_train_step(answer_loss(vlm.model), optax.adamw(1e-5), accumulate=4)
      state, metrics = step(init_state(tuned, optimizer), batch, frozen)
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int | np.integer) or accumulate < 1:
        raise InputError(f"accumulate={accumulate!r}: give a number of parts, at least 1")

    def gradients(tuned: Params, frozen: Params, batch: Any, *key: jax.Array) -> tuple[Params, Metrics]:
        def objective(tuned: Params) -> tuple[jax.Array, Metrics]:
            value, metrics = loss(merge(frozen, tuned), batch, *key)
            return value, metrics | {"loss": value}

        return jax.grad(objective, has_aux=True)(tuned)

    def accumulated(tuned: Params, frozen: Params, batch: Any, *key: jax.Array) -> tuple[Params, Metrics]:
        keys = [jax.random.split(one, accumulate) for one in key]
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(part: Any) -> tuple[Params, Metrics, jax.Array]:
            grads, metrics = gradients(tuned, frozen, *part)
            weight = metrics.get("weight", jnp.ones(()))
            with jax.numpy_dtype_promotion("standard"):  # sums of bfloat16 gradients are float32, as their weights are
                return *jax.tree.map(lambda x: x * weight, (grads, metrics)), weight

        def body(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(part)), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], (parts, *keys)))
        )
        (grads, metrics, weight), _ = jax.lax.scan(body, zeros, (parts, *keys))
        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.map(lambda x: x / weight, (grads, metrics))

    def step(
        state: TrainState, batch: Any, frozen: Params, scale: jax.Array | float = 1.0
    ) -> tuple[TrainState, Metrics]:
        tuned = state.params
        _warn_of_rounding(tuned)
        key = () if seed is None else (jax.random.fold_in(jax.random.key(seed), state.step),)
        grads, metrics = (gradients if accumulate == 1 else accumulated)(tuned, frozen, batch, *key)
        # Optax takes powers of its rates by its count of steps; parameters, updates and scale may differ in dtype.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, tuned)
            tuned = optax.apply_updates(tuned, jax.tree.map(lambda u: u * scale, updates))
            metrics = metrics | {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(tuned, opt_state, state.step + 1), metrics

    def places(arguments: Any, results: Any) -> Any:
        """Of the results on a mesh with Explicit axes: the state lies where it lay."""
        state = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments[0])
        return state, jax.tree.map(lambda _: PartitionSpec(), results[1])

    compiled = jax.jit(automatic(step, places), donate_argnums=0)

    def run(
        state: TrainState, batch: Any, frozen: Params | None = None, scale: jax.Array | float = 1.0
    ) -> tuple[TrainState, Metrics]:
        if accumulate > 1:
            _check_rows(batch, accumulate)
        with on_mesh_of((frozen, state.params), batch):
            return compiled(state, batch, frozen or {}, scale)

    return run


def _warn_of_rounding(tuned: Params) -> None:
    """While the step is traced: once for each program."""
    types = {path: x.dtype for path, x in flatten_dict(tuned, sep="/").items()}
    short = {path: dtype for path, dtype in types.items() if dtype in (jnp.bfloat16, jnp.float16)}
    if short:
        path, dtype = next(iter(short.items()))
        warnings.warn(
            f"{len(short)} trainable parameters are {dtype}, such as {path}: updates of less than half a step of such "
            "a number round away, and little is learnt at usual rates. Load them with vlcache_jax.load(..., "
            'param_dtype="float32"), or cast them to float32; the model computes in its own dtype all the same',
            stacklevel=2,
        )


def _check_rows(batch: Any, accumulate: int) -> None:
    shapes = {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    rows = {shape[:1] for shape in shapes.values()}
    if len(rows) != 1 or rows == {()}:
        raise InputError(f"the batch's arrays disagree on the number of rows, their first axis: {shapes}")
    ((count,),) = rows
    if count % accumulate or not count:
        nearest = [n for n in range(1, count + 1) if count % n == 0]
        raise InputError(
            f"accumulate={accumulate} does not divide the batch's {count} rows: use one of {nearest}, or another batch"
        )
