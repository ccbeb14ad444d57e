"""The errors a user can meet, each of which names the thing, the value and the remedy; and checks of options."""

from typing import Any


class VLCacheError(ValueError):
    """Base of every error this library raises for bad input. The command line prints it without a traceback."""


class CheckpointError(VLCacheError):
    """A checkpoint folder is missing, unsafe, corrupt, or does not fit the model it describes."""


class PlacementWarning(UserWarning):
    """A mesh leaves whole on every device what it could split: memory and work are lost, no answer changes."""


class NonFiniteError(CheckpointError):
    """Scores or logits are NaN or infinite, so that an answer means nothing. Raised after all has run.

    Attributes:
      rows: of the batch, whose answers mean nothing; an index for each axis of the answers, where they have several.
      result: what the call would have returned; its other rows are as they should be.
    """

    def __init__(self, message: str, rows: tuple[Any, ...], result: Any) -> None:
        super().__init__(message)
        self.rows = rows
        self.result = result


class InputError(VLCacheError):
    """An image, a prompt, a batch or a generation length cannot be used."""


class PolicyWarning(UserWarning):
    """A cache policy does something its user may not expect, such as a window that leaves the scores no say."""


class PolicyError(VLCacheError):
    """A cache policy is misconfigured: an unknown name, an option out of range, an impossible combination."""


def is_whole(value: Any, least: float) -> bool:
    """Whether an option is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether an option is a number from `least` to `most`; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
