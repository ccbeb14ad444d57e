"""Compiling a program for a mesh of described TPUs, from shapes alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def abstract(tree: Any, mesh: Mesh, specs: Any = None) -> Any:
    """Shapes with a place on a mesh.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh.
      specs: a `PartitionSpec` or `NamedSharding` for every leaf, or a prefix of such a tree; replicated by default.

    Returns:
      The same tree of `jax.ShapeDtypeStruct`s with shardings.
    """

    def place(spec: Any, subtree: Any) -> Any:
        sharding = NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else spec
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), subtree)

    if specs is None:
        specs = PartitionSpec()
    is_leaf = lambda x: isinstance(x, PartitionSpec | NamedSharding)  # noqa: E731
    return jax.tree.map(place, specs, tree, is_leaf=is_leaf)


def compile_on(
    mesh: Mesh,
    function: Callable[..., Any],
    *args: Any,
    donate: Sequence[int] = (),
    out_shardings: Any = None,
    keep_unused: bool = False,
) -> Any:
    """Compiles `function(*args)` for the devices of a mesh.

    Args:
      mesh: of `tpu_devices`.
      function: traceable; static arguments are bound beforehand.
      *args: pytrees from `abstract`.
      donate: numbers of the arguments whose memory the results may take.
      out_shardings: as in `jax.jit`; None lets the compiler choose.
      keep_unused: count arguments that the program does not use, as they lie in memory all the same.

    Returns:
      The compiled program: `memory_analysis()`, `cost_analysis()`, `as_text()`.
    """
    # Some lowerings ask the default device what it is, unless a mesh is set.
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, donate_argnums=tuple(donate), out_shardings=out_shardings, keep_unused=keep_unused)
        lowered = jitted.trace(*args).lower(lowering_platforms=("tpu",))
        with warnings.catch_warnings():
            # JAX keeps such a program in its persistent cache, but cannot read it back without a TPU.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            return lowered.compile()
