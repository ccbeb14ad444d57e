"""Pruning methods as they are typed: `method[:keep][,option=number/number...]...`."""

import vlcache_jax.pruning.methods  # noqa: F401  (the methods make themselves known)
from vlcache_jax.pruning.method import METHODS, Pruning
from vlcache_jax.terminal.options import instance


def pruning_by_name(text: str) -> Pruning:
    """The pruning method that a text names.

    Args:
      text: a method's name, then, behind a colon, its `keep`, and behind commas other options, where its own are not
        wanted; an option is a number, or numbers with "/" between them.

    Raises:
      PolicyError: a name or option that does not exist, with the nearest, or a value that is none.

    Example:
      >>> pruning_by_name("pyramid_drop:0.5/0.25,layers=4/8")
      PyramidDrop(rooms=None, layers=(4, 8), keep=(0.5, 0.25))
    """
    return instance(text, METHODS, "pruning", "keep=0.25", first="keep")
