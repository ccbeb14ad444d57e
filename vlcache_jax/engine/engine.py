"""`Engine`: any number of requests, each answered as if it were alone."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Literal

import jax

from vlcache_jax.cache.geometry import answer_room
from vlcache_jax.engine.buckets import Bucket, check_buckets, fit, sixty_fours
from vlcache_jax.engine.memory import available, need, usual_rows
from vlcache_jax.engine.preparing import Preparer, Read
from vlcache_jax.engine.programs import OF_ROWS, Programs
from vlcache_jax.engine.reading import Reader
from vlcache_jax.engine.requests import Request, Result
from vlcache_jax.engine.running import Running
from vlcache_jax.engine.service import Service
from vlcache_jax.engine.stats import CompileCounter, Stats
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.inference.context import check_count
from vlcache_jax.inference.loop import DecodingState
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inference.validation import check_recipe
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.text.buckets import bucket_length
from vlcache_jax.parallel.ops import Kernels
from vlcache_jax.policies.policy import Policy

MOST_BUCKETS, MOST_STOP_IDS, PREFILL_TOKENS = 6, 8, 4096
FIRST = 64
"""Requests for which buckets are chosen, where nothing else says for which."""


class Engine:
    """Answers requests with one running decode batch: rows that have ended are given to the next request.

    Prompts are padded to a few buckets and read in micro-batches, compressed, and inserted into free rows. All shapes
    are fixed: two programs for each bucket and three for the rows, whatever is asked. A request's answer depends on
    the request and the engine's options, never on when it came or what ran beside it.

    Args:
      vlm: the loaded checkpoint. For prompts that are batches already, anything with a `model`, `params` and a
        `processor`, which may be None.
      policy: what to keep of the prompts' caches, `FullCache()` by default; or a `vlc.Recipe`. Pruning saves time if
        its `rooms` are given: the engine's programs are compiled before prompts are known.
      rows: answers that are decoded at the same time. By default as many as fit: what the compiler says of the largest
        bucket's prefill and of a row, beside the free memory of the device.
      most_rows: at most so many, where they are "auto"; 256 by default, and 32 on a CPU, where idle rows take time.
      max_new_tokens: of the longest answer.
      question_tokens: of the longest question of requests with several questions to one prompt; 0 for no such requests.
        Every row has room for so many more tokens, which are kept whole.
      top_log_probabilities: the most that a request may ask for; 0 for none, which costs nothing. Others take memory,
        and time while a row asks for log-probabilities.
      buckets: pairs (tokens, tiles of images, or patches as Qwen2-VL has them) that prompts are padded to; for prompts
        with videos of a Qwen-VL (tokens, patches, 2), of two frames each. By default
        at most six are chosen for the requests that `warmup` is given, or for the first ones of the first run; a prompt
        that fits in none of them fails.
      prefill_rows: prompts of a micro-batch; by default as many as have 4,096 tokens in all on each device over which a
        mesh splits rows, and at most `rows`.
      steps: the most tokens that are added to the answers before the host looks at them: for stop texts, and for
        requests that came in since.
      leave_after: rows that must have ended before the loop on the device is left earlier; an eighth of them by
        default, so that they stand idle for an eighth of the time at most.
      threads: of the host, which read requests ahead; as many as there are processors by default, and at most 16.
      ahead: requests that are read ahead; twice the rows and at least 16 by default.
      memory_bytes: of each device that rows and prefills may take together, where rows are "auto"; by default nine
        tenths of what the device says is free, and on a CPU of half of that.
      kernels: as in `vlc.generate`.

    Raises:
      InputError: a number below 1, or buckets that are none or larger than the model. Later, before anything runs: rows
        are "auto" and not one fits, or a device does not tell its memory.
      PolicyError: a policy or recipe that does not fit the model, or several buckets or questions for a policy whose
        rule for generated tokens rewrites what was kept.

    Example:
      engine = vlc.Engine(vlm, vlc.VLCache(budget=0.1), rows=32, max_new_tokens=64)
      for result in engine.run(vlc.Request(id=name, prompt=text, images=[name]) for name, text in questions):
          print(result.id, result.text if result.ok else result.reason)
    """

    def __init__(
        self,
        vlm: VLM,
        policy: Policy | Recipe | None = None,
        *,
        rows: int | Literal["auto"] = "auto",
        most_rows: int | None = None,
        max_new_tokens: int = 64,
        question_tokens: int = 0,
        top_log_probabilities: int = 0,
        buckets: Sequence[tuple[int, ...]] | None = None,
        prefill_rows: int | None = None,
        steps: int = 32,
        leave_after: int | None = None,
        threads: int | None = None,
        ahead: int | None = None,
        memory_bytes: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        threads = min(16, os.cpu_count() or 1) if threads is None else threads
        counts = {"max_new_tokens": max_new_tokens, "steps": steps, "threads": threads}
        given = {
            "most_rows": most_rows,
            "leave_after": leave_after,
            "ahead": ahead,
            "prefill_rows": prefill_rows,
            "memory_bytes": memory_bytes,
        }
        counts |= {name: value for name, value in given.items() if value is not None}
        for name, value in (counts if rows == "auto" else {"rows": rows, **counts}).items():
            check_count(name, value)
        if question_tokens != 0:
            check_count("question_tokens", question_tokens)
        if top_log_probabilities != 0:
            check_count("top_log_probabilities", top_log_probabilities)
        recipe, room = recipe_of(policy), answer_room(max_new_tokens)
        check_recipe(vlm.model.spec, recipe)
        self._programs = Programs(
            vlm.model,
            vlm.params,
            recipe,
            kernels or Kernels(),
            0 if rows == "auto" else rows,  # until they are known
            room,
            question_tokens,
            MOST_STOP_IDS,
            top_log_probabilities or None,
        )
        self._preparer = Preparer(vlm.processor, vlm.model, recipe, max_new_tokens, question_tokens, MOST_STOP_IDS)
        self._preparer = dataclasses.replace(self._preparer, top_log_probabilities=top_log_probabilities)
        self._steps, self._leave_after, self._threads, self._ahead = steps, leave_after, threads, ahead
        self._prefill_rows, self._memory_bytes, self._most_rows = prefill_rows, memory_bytes, most_rows
        self._buckets: dict[Bucket, int] = {}
        self._stats = Stats(rows=self._programs.rows)
        self._state: DecodingState | None = None
        self._busy, self._serving = threading.Lock(), threading.Lock()
        self._service: Service | None = None
        if buckets is not None:
            self._set_buckets(check_buckets(buckets))

    @property
    def buckets(self) -> dict[Bucket, int]:
        """The buckets, (tokens, tiles, frames of a patch), and how many prompts of each a micro-batch has.

        Empty until they are chosen.
        """
        return dict(self._buckets)

    @property
    def top_log_probabilities(self) -> int:
        """The most that a request may ask for."""
        return self._preparer.top_log_probabilities

    def stats(self) -> Stats:
        """What was done so far: counts, shares of padding and of idle rows, compilations."""
        return dataclasses.replace(self._stats)

    def warmup(self, requests: Iterable[Request] = ()) -> Stats:
        """Compiles all programs, and runs each once: nothing is compiled afterwards.

        Args:
          requests: examples, for which the buckets are chosen if the engine was given none: a prompt that is longer
            than all of them, rounded up to a multiple of 64 tokens, fails later. They are only read.

        Returns:
          The stats; `programs` says how many there are.

        Raises:
          InputError: there are no buckets, and no request that could be read to choose them for.
        """
        self._begin()
        try:
            if not self._buckets:
                self._choose_buckets(self._sizes(requests), sixty_fours)
            self._compile()
        finally:
            self._busy.release()
        return self.stats()

    def run(self, requests: Iterable[Request], *, ordered: bool = False) -> Iterator[Result]:
        """Answers requests.

        Args:
          requests: any iterable; read ahead by a thread, as far as `ahead` says.
          ordered: hand out results in the order of their requests and samples; by default as they finish.

        Yields:
          A result for each sample of each request, and one for each request that fails, with its reason.

        Raises:
          InputError: the engine runs already.
        """
        results = self._run(requests)
        return _in_order(results) if ordered else results

    def submit(self, request: Request) -> "Future[list[Result]]":
        """Answers a request beside others, on a thread that the first call starts; `close` ends it.

        Returns:
          The future of the request's results, one for each sample; to cancel it gives its answers up.
        """
        with self._serving:
            if self._service is None or self._service.ended:
                self._service = Service(self.run)
            return self._service.submit(request)

    def close(self) -> None:
        """Answers what was submitted, and ends the thread."""
        with self._serving:
            if self._service is not None:
                self._service.close()
                self._service = None

    def _run(self, requests: Iterable[Request]) -> Iterator[Result]:
        self._begin()
        start, reader = time.monotonic(), None
        try:
            requests, early = iter(requests), {}
            if not self._buckets:
                first = list(islice(requests, self._ahead or FIRST))
                with ThreadPoolExecutor(self._threads) as pool:
                    reads = list(pool.map(self._preparer.read, range(len(first)), first))
                self._choose_buckets(reads)
                early, requests = {read.index: read for read in reads}, chain(first, requests)
            self._compile()
            state, self._state = self._state, None  # donated: gone if something goes wrong
            assert state is not None

            def read(index: int, request: Request) -> Read:
                found = early.pop(index, None) or self._preparer.read(index, request)
                return self._preparer.padded(found, tuple(self._buckets))

            rows = self._programs.rows
            reader = Reader(requests, read, self._threads, self._ahead or max(16, 2 * rows))
            with CompileCounter(self._stats):
                running = Running(
                    self._programs,
                    state,
                    self._buckets,
                    self._steps,
                    self._leave_after or max(1, rows // 8),
                    None if self._preparer.processor is None else self._preparer.processor.tokenizer.decode,
                    reader,
                    self._stats,
                )
                yield from running.results()
            self._state = running.state
        finally:
            self._stats.seconds += time.monotonic() - start
            self._stats.rows_in_flight = 0
            self._busy.release()
            if reader is not None:
                reader.close()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise InputError("the engine runs already: wait for its results, or use submit")

    def _sizes(self, requests: Iterable[Request]) -> Iterator[Read]:
        """Reads requests, and forgets them."""
        reader = Reader(requests, self._preparer.read, self._threads, self._ahead or FIRST)
        try:
            while reads := reader.take(wait=True):
                reader.release(len(reads))
                yield from reads
        finally:
            reader.close()

    def _choose_buckets(self, reads: Iterable[Read], padded: Callable[[int], int] = bucket_length) -> None:
        sizes, why = [], "there are no requests"
        for read in reads:
            if read.reason is None:
                sizes.append(read.bucket)
            else:
                why = read.reason
        if not sizes:
            raise InputError(
                f"there is no prompt to choose buckets for ({why}): give Engine(buckets=[(tokens, tiles), ...]), or "
                "warmup some requests that can be read"
            )
        most = self._programs.model.spec.max_positions
        self._set_buckets(fit(sizes, MOST_BUCKETS, lambda tokens: max(tokens, min(most, padded(tokens)))))

    def _set_buckets(self, buckets: Sequence[Bucket]) -> None:
        programs = self._programs
        positions, policy = programs.model.spec.max_positions, programs.recipe.policy
        rule = policy.rule
        if programs.question_tokens and rule.rewrites_context:
            raise PolicyError(
                f"policy {policy.name!r} has the rule decoding={rule}, which rewrites what was kept: nothing "
                "can be appended to its prompts; leave question_tokens out, or use decoding=Append()"
            )
        if len(buckets) > 1 and rule.rewrites_context:
            raise PolicyError(
                f"policy {policy.name!r} has the rule decoding={rule}, which rewrites what was kept: then all "
                f"rows must have one size; give one bucket, such as buckets=[{buckets[-1].given}]"
            )
        for bucket in buckets:
            if bucket.tokens > positions:
                raise InputError(f"a bucket of {bucket.tokens} tokens is larger than the model's {positions} positions")
            rows = self._prefill_rows or programs.split * max(1, PREFILL_TOKENS // bucket.tokens)
            self._buckets[bucket] = min(rows, programs.rows or rows)

    def _choose_rows(self) -> None:
        """As many as fit, if that was asked for."""
        programs, largest = self._programs, max(self._buckets)
        if programs.rows:
            return
        needed = need(programs, largest, self._buckets[largest])
        free = self._memory_bytes or available(programs.params)
        rows = min(self._most_rows or usual_rows(), needed.rows(free))
        rows = max(rows // programs.split * programs.split, min(rows, programs.split))
        if not rows:
            raise InputError(
                f"no row fits into {free:,} bytes: reading a micro-batch of {self._buckets[largest]} prompts of "
                f"{largest.tokens} tokens takes {needed.prefill:,}, and a row {needed.row:,}: lower prefill_rows, the "
                "largest bucket, the budget or max_new_tokens"
            )
        self._programs = dataclasses.replace(programs, rows=rows)
        self._buckets = {bucket: min(size, rows) for bucket, size in self._buckets.items()}
        self._stats.rows = rows

    def _compile(self) -> None:
        """Runs each program once, unless that was done."""
        if self._state is not None:
            return
        sized = int(not self._programs.rows)
        with CompileCounter(self._stats):
            self._choose_rows()
            programs = self._programs
            state, inserted = None, set()
            for bucket in sorted(self._buckets, reverse=True):  # rows have the size of the largest
                prompt, _ = programs.read(programs.nothing(bucket, self._buckets[bucket]))
                if programs.question_tokens:
                    inserted.add(str(jax.tree.map(jax.typeof, prompt)))
                    prompt = programs.ask(prompt, [], [])
                if state is None:
                    state = programs.free(prompt)
                state = programs.insert(state, prompt, [], [], programs.options(len(prompt.logits)))
                inserted.add(str(jax.tree.map(jax.typeof, prompt)))  # of budgets in tokens, all buckets' are alike
            assert state is not None
            self._state = programs.end(programs.decode(state, 1, 1), [])
        self._stats.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state.kv))
        self._stats.programs = OF_ROWS + len(self._buckets) + len(inserted) + sized


def _in_order(results: Iterator[Result]) -> Iterator[Result]:
    """Results held back until all before them are there."""
    held: dict[int, list[Result]] = {}
    following = 0
    for result in results:
        held.setdefault(result.index, []).append(result)
        while len(found := held.get(following, [])) and len(found) == found[0].answers:
            yield from sorted(held.pop(following), key=lambda result: (result.question, result.sample))
            following += 1
