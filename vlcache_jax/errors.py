"""The errors a user can meet. Each message names the thing, the value and the remedy."""

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
