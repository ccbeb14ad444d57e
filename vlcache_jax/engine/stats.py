"""What an engine has done so far, counted from what ran."""

import dataclasses

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made; a copy, from `Engine.stats`.

    Attributes:
      rows: of the decode batch.
      state_bytes: of its buffers, on all devices together; 0 until it is warm.
      programs: that the engine needs in all, with the one that tells how large a row is; 0 until it is warm.
      compilations: programs compiled or read from the compilation cache while it warmed up or ran; whatever else the
        process compiles at the time is counted, too.
      requests, results, failed, cancelled: that came in, and went out; the last two are among the results.
      prompt_tokens, padded_tokens: of the prompts, without and with padding, idle rows of micro-batches included.
      tokens: generated.
      row_steps: decoding steps times rows.
      rows_in_flight: answers that are being decoded now.
      seconds: of all runs.
      idle_seconds: of those, in which the device had nothing to do for certain: before the first request was read, and
        whenever the next step waited for the host.
    """

    rows: int = 0
    state_bytes: int = 0
    programs: int = 0
    compilations: int = 0
    requests: int = 0
    results: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    padded_tokens: int = 0
    tokens: int = 0
    decoded: int = 0
    row_steps: int = 0
    rows_in_flight: int = 0
    seconds: float = 0.0
    idle_seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """Of the prompts' padded tokens, those that are padding."""
        return 1 - self.prompt_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def idle_row_share(self) -> float:
        """Of the rows of all decoding steps, those without an answer."""
        return 1 - self.decoded / self.row_steps if self.row_steps else 0.0

    @property
    def idle_share(self) -> float:
        """Of the seconds, those in which the device had nothing to do for certain."""
        return self.idle_seconds / self.seconds if self.seconds else 0.0


class CompileCounter:
    """Counts what is compiled in a `with` block into `stats.compilations`."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def __enter__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._stats.compilations += event == _COMPILED
