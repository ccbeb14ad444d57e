"""The loop of an engine: what the device is told to do, and when the host looks.

    take what was read, prefill and insert while rows are free, decode, prefill ahead, hand out, look at the rows

Whoever follows an answer is asked in every turn whether it is still wanted, also while it waits.

Nothing waits between a prefill, the insertion of its rows and the next steps; the host waits once in a turn, for the
rows' flags, and then the device still has the next prefill to do. Results are handed out while the device decodes.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from vlcache_jax.engine.buckets import Bucket
from vlcache_jax.engine.preparing import Read
from vlcache_jax.engine.programs import Programs, chosen, stacked
from vlcache_jax.engine.reading import Reader
from vlcache_jax.engine.requests import Result
from vlcache_jax.engine.stats import Stats
from vlcache_jax.engine.table import Answer, Decode, dropped, failure, given_up, result
from vlcache_jax.inference.loop import DecodingState
from vlcache_jax.inference.rows import Prompt

PATIENCE = 4
"""Turns that a prompt waits for others of its bucket; then its micro-batch goes without them."""


class Running:
    """One run of an engine.

    Args:
      programs: of the engine.
      state: of its rows, all free; afterwards `state` is the one to go on with.
      prefill_rows: rows of a micro-batch of each bucket.
      steps, leave_after: as in `decode_chunk`.
      decode: of the processor.
      reader: where requests come from.
      stats: to be counted on.
    """

    def __init__(
        self,
        programs: Programs,
        state: DecodingState,
        prefill_rows: Mapping[Bucket, int],
        steps: int,
        leave_after: int,
        decode: Decode | None,
        reader: Reader,
        stats: Stats,
    ) -> None:
        self.state = state
        self._programs, self._prefill_rows, self._decode, self._stats = programs, prefill_rows, decode, stats
        self._steps, self._leave_after, self._reader = steps, leave_after, reader
        self._rows: list[Answer | None] = [None] * programs.rows
        self._waiting: dict[Bucket, deque[tuple[Read, int]]] = {bucket: deque() for bucket in prefill_rows}
        self._prompts: deque[tuple[Prompt, deque[Answer]]] = deque()
        self._results: list[Result] = []
        self._turn = 0
        self._idle_since: float | None = time.monotonic()

    def results(self) -> Iterator[Result]:
        """Runs until all requests have ended."""
        while True:
            self._turn += 1
            self._take()
            if self._nothing_left and self._reader.ended:
                break
            while self._free and (self._prompts or self._prefill()):
                self._insert()
            running = self._active
            if running:
                self._busy()
                self.state = self._programs.decode(self.state, self._steps, self._leave_after)
                ahead = not self._prompts and self._prefill()
            yield from self._hand_out()
            if running:
                self._look()
                if not ahead:
                    self._idle_since = time.monotonic()
        yield from self._hand_out()

    @property
    def _active(self) -> int:
        return sum(answer is not None for answer in self._rows)

    @property
    def _free(self) -> list[int]:
        return [row for row, answer in enumerate(self._rows) if answer is None]

    @property
    def _tops(self) -> bool:
        """Whether a row asks for the likeliest tokens."""
        return any(answer is not None and answer.read.request.top_log_probabilities for answer in self._rows)

    @property
    def _nothing_left(self) -> bool:
        return not (self._active or self._prompts or any(self._waiting.values()))

    def _take(self) -> None:
        """What was read since; waits for it if there is nothing else to do."""
        for read in self._reader.take(wait=self._nothing_left and not self._results):
            self._stats.requests += 1
            if read.reason is None:
                self._waiting[read.bucket].append((read, self._turn))
            else:
                self._results.append(failure(read))
                self._reader.release(1)
        for bucket, queue in self._waiting.items():
            gone = {read.index: found for read, _ in queue if (found := dropped(read)) is not None}
            if gone:
                self._results += gone.values()
                self._reader.release(len(gone))
                self._waiting[bucket] = deque(item for item in queue if item[0].index not in gone)

    def _ready(self) -> Bucket | None:
        """The bucket of the next micro-batch: of those that are full or wait no longer, that of the oldest request."""
        heads = sorted((queue[0][0].index, bucket) for bucket, queue in self._waiting.items() if queue)
        now = self._reader.ended or self._reader.full or not self._active
        for _, bucket in heads:
            queue = self._waiting[bucket]
            if now or len(queue) >= self._prefill_rows[bucket] or self._turn - queue[0][1] >= PATIENCE:
                return bucket
        return None

    def _prefill(self) -> bool:
        """Sends a micro-batch to the device; False if there is none worth it."""
        bucket = self._ready()
        if bucket is None:
            return False
        rows, queue = self._prefill_rows[bucket], self._waiting[bucket]
        reads = [queue.popleft()[0] for _ in range(min(rows, len(queue)))]
        self._busy()
        prompt, kept = self._programs.read(stacked([read.batch for read in reads], rows))  # type: ignore[misc]
        answers = deque(
            Answer(read, question, sample, of, kept)
            for of, read in enumerate(reads)
            for question in range(len(read.questions))
            for sample in range(read.request.samples)
        )
        self._prompts.append((prompt, answers))
        self._reader.release(len(reads))
        self._stats.prompt_tokens += sum(read.tokens for read in reads)
        self._stats.padded_tokens += rows * bucket.tokens
        return True

    def _insert(self) -> None:
        """Begins answers to the first of the prompts in free rows."""
        prompt, waiting = self._prompts[0]
        free, answers = self._free, list[Answer]()
        while waiting and len(answers) < min(len(free), len(prompt.logits)):
            answer = waiting.popleft()
            if (found := given_up(answer)) is None:
                answers.append(answer)
            else:
                self._results.append(found)
        if not waiting:
            self._prompts.popleft()
        if not answers:
            return
        options = [(answer.read.options, answer.sample) for answer in answers]
        rows, of = free[: len(answers)], [answer.of for answer in answers]
        self._busy()
        if self._programs.question_tokens:
            prompt = self._programs.ask(prompt, of, [answer.read.questions[answer.question] for answer in answers])
            of = list(range(len(answers)))
        together = chosen(options, len(prompt.logits))  # type: ignore[arg-type]
        self.state = self._programs.insert(self.state, prompt, rows, of, together)
        for row, answer in zip(rows, answers):
            self._rows[row], answer.started = answer, time.monotonic()

    def _look(self) -> None:
        """Waits for the steps, and takes out the rows that have ended."""
        state, stopped = self.state, []
        top = () if state.top is None or not self._tops else state.top
        of_tokens = (state.tokens, state.log_probabilities, state.sampling_log_probabilities, *top)
        arrays = jax.device_get((state.step, state.done, state.kv.finite, *of_tokens))
        steps, done, finite, tokens, *of_rows = (np.asarray(x) for x in arrays)
        most = 0
        for row, answer in enumerate(self._rows):
            if answer is None:
                continue
            new, answer.steps = int(steps[row]) - max(answer.steps, 1), int(steps[row])  # the first token took no step
            self._stats.decoded += new
            most = max(most, new)
            own = tokens[row, : steps[row]].copy()
            logs = tuple(x[row] for x in of_rows)
            found = result(answer, own, logs, done[row], finite[row], self._decode) or given_up(answer, own, logs)
            if found is not None:
                self._results.append(found)
                self._stats.tokens += len(found.tokens)
                self._rows[row] = None
                if not done[row]:
                    stopped.append(row)
        self._stats.row_steps += most * len(self._rows)
        if stopped:
            self.state = self._programs.end(self.state, stopped)

    def _hand_out(self) -> Iterator[Result]:
        results, self._results = self._results, []
        self._stats.results += len(results)
        self._stats.failed += sum(result.finish == "failed" for result in results)
        self._stats.cancelled += sum(result.finish == "cancelled" for result in results)
        self._stats.rows_in_flight = self._active
        yield from results

    def _busy(self) -> None:
        """From here on the device has something to do."""
        if self._idle_since is not None:
            self._stats.idle_seconds += time.monotonic() - self._idle_since
            self._idle_since = None
