"""The engine that embeds a rack: batches of tiles through warm encoders, on as many threads as there are cores.

Every worker thread reads a batch of tiles and takes it through each encoder that wants the slide, so a tile is read
once however many encoders there are, and reading never competes with the model for a core: a core does one or the
other. A feeding thread keeps a few batches waiting, across slides, so that no worker stops between two slides; waiting
batches are numbers, not pixels. A writing thread takes the features of a slide in order, as they come, so that memory
does not grow with the slide, and commits them with the last batch. A batch never holds tiles of two slides, so features
do not depend on what else was in the rack, on the number of threads, or on where an earlier job was killed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure
from slidemake.embedding.forward import Forward, prepare_thread
from slidemake.jobs import isolation
from slidemake.stores.tile_store import TileStore, store_fingerprint

log = logging.getLogger("slidemake")

FeatureSink = AbstractContextManager[Callable[[np.ndarray], None]]  # takes features (n, D), commits them at its end

WAITING = 2  # batches that wait beyond those that are worked on: enough that no worker ever finds none
UNWRITTEN = 64  # batches of a slide whose features are not written yet: a slow disk slows the rest down


@dataclass(frozen=True)
class SlideJob:
    """One slide to embed: where its tiles are, how they are stain-normalised, where the features go."""

    slide_id: str
    tiles: Path
    out: Path
    stain: dict[str, Any] | None  # stain transform, None for tiles as they are
    stain_info: dict[str, Any]
    fingerprint: str
    slide: dict[str, Any]  # slide.json, for stores that keep coordinates only


class Source:
    """The tiles of a slide in order: the stored pixels or, for `store: coords`, read from the slide itself."""

    def __init__(self, job: SlideJob):
        self.store, self.slide = TileStore(job.tiles), job.slide
        self.reader: Any = None
        if not self.store.has_pixels:
            from slidemake.slides.opening import open_screened

            self.reader = open_screened(job.slide)

    def __len__(self) -> int:
        return len(self.store)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tiles start..stop: (n, H, W, 3) uint8. Thread-safe."""
        return read_selected(self.store, self.slide, self.reader, range(start, stop))

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


def read_selected(store: TileStore, slide: dict[str, Any], reader: Any, indices: Iterable[int]) -> np.ndarray:
    """Tiles (n, H, W, 3) uint8 of a store that has them, or, for `store: coords`, out of the open slide."""
    if store.has_pixels:
        return store.read_tiles(indices)
    from slidemake.tiles.grid import parse_grid, slide_window
    from slidemake.tiles.reading import read_tiles

    grid = parse_grid(store.attrs["grid"], store.attrs["stride_px"])
    # a store whose tiles were taken within tolerance says so by not having resampled
    tolerance = 0.0 if store.attrs["resampling"] != "none" else 0.25
    window = slide_window(grid, slide, tolerance)
    coords = store.coords[np.asarray(list(indices), int)]
    tiles, good = read_tiles(reader, coords, window)
    if not good.all():
        bad = coords[~good][0].tolist()
        raise SlideFailure("unreadable", f"the tile at {bad} decoded while tiling, and no longer does")
    return tiles


def stain_hook(transform: dict[str, Any] | None) -> Callable[[Any], Any] | None:
    """The transform as a function of tensors (B, 3, H, W); None where there is none."""
    if transform is None:
        return None
    from slidemake.stain.fit import StainTransform
    from slidemake.stain.on_device import apply_stain

    values = StainTransform.from_dict(transform)
    return lambda tensor: apply_stain(tensor, values)


class Output:
    """The features of a slide by one encoder on their way to where they go, written by one thread.

    `open_sink()` gives the context that takes them; `key` names the encoder in messages; `started`: when the slide's
    first batch was (perf_counter). After the first error nothing more is taken.
    """

    def __init__(self, job: SlideJob, open_sink: Callable[[], FeatureSink], key: str, started: float):
        self._job, self._key, self._tiles, self._started = job, key, 0, started
        self._error: Exception | None = None
        self._context = ExitStack()
        with self._guarded():
            self._append = self._context.enter_context(open_sink())

    def add(self, part: np.ndarray | Exception) -> None:
        """Features (n, D) of the next tiles, or why there are none."""
        if self._error is not None:
            return
        with self._guarded():
            if isinstance(part, Exception):
                raise part
            if not np.isfinite(part).all():
                raise SlideFailure("crashed", f"{self._key} gave features that are not finite")
            self._append(part)
            self._tiles += len(part)

    def finish(self, result: Future[dict[str, Any]]) -> None:
        """Commit, and say so, or what went wrong, to who waits for it."""
        if self._error is None:
            with self._guarded():
                self._context.close()
        rate = self._tiles / max(time.perf_counter() - self._started, 1e-9)
        settle(result, self._error or {"tiles": self._tiles, "tiles_per_second": round(rate, 1)})

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error, raised or on its way out of the context, is kept, and the context left without committing."""
        try:
            with isolation.working_on(self._job.slide_id):
                yield
        except Exception as error:
            self._error = error
            try:
                self._context.__exit__(type(error), error, error.__traceback__)
            except Exception as other:
                log.warning("%s: what is left of its features could not be removed: %s", self._job.slide_id, other)


class Engine:
    """Embeds slides in the background, in the order given; `result` waits for one of them.

    `work`: for each slide {encoder number: what that encoder is to make of it}; `models`: by encoder number; `output`:
    called with (encoder number, job, tile store), from one thread, for a context whose value takes the features of a
    slide, part by part, and which commits them at its end.
    """

    def __init__(
        self,
        work: list[dict[int, SlideJob]],
        models: dict[int, Forward],
        output: Callable[[int, SlideJob, TileStore], FeatureSink],
        *,
        batch: int,
        workers: int,
        progress: Callable[[int], None],
        dtype: str = "float32",
    ):
        self._work, self._models, self._output, self._batch_size, self._progress = work, models, output, batch, progress
        self._dtype = dtype
        self._results: dict[tuple[int, str], Future[dict[str, Any]]] = {
            (number, job.slide_id): Future() for jobs in work for number, job in jobs.items()
        }
        self._stopped = threading.Event()
        self._slots = threading.Semaphore(workers + WAITING)
        device = next((model.device for model in models.values()), "cpu")
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="model", initializer=prepare_thread, initargs=(device,)
        )
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._feeder = threading.Thread(target=self._feed, name="feeder", daemon=True)
        self._feeder.start()

    def result(self, number: int, slide_id: str) -> dict[str, Any]:
        """Figures of a slide once it is committed; raises what went wrong with it."""
        return self._results[number, slide_id].result()

    def close(self) -> None:
        """Stop after the batches that are being worked on, and commit slides that are complete with them; safe to call
        at any time.
        """
        self._stopped.set()
        self._slots.release()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)
        self._writer.shutdown()

    def _abandon(self, error: RunError) -> None:
        """The run cannot go on: whoever waits for a slide that is not finished is told so, and no more is begun."""
        self._stopped.set()
        for result in self._results.values():
            settle(result, error)

    def _feed(self) -> None:
        for jobs in self._work:
            if self._stopped.is_set():
                return
            jobs = self._unfinished(jobs)
            if not jobs:
                continue
            first = next(iter(jobs.values()))
            try:
                with isolation.working_on(first.slide_id):
                    source = Source(first)
                stains = {number: stain_hook(job.stain) for number, job in jobs.items()}
            except Exception as error:  # raised where the slide's result is asked for
                self._fail(jobs, error)
                continue
            batches: queue.Queue[Future | None] = queue.Queue(UNWRITTEN)
            self._writer.submit(self._write, source, jobs, batches, time.perf_counter())
            try:
                for start in range(0, len(source), self._batch_size):
                    self._slots.acquire()
                    if self._stopped.is_set():
                        return
                    batches.put(self._pool.submit(self._one_batch, first.slide_id, source, start, stains))
            finally:
                batches.put(None)

    def _unfinished(self, jobs: dict[int, SlideJob]) -> dict[int, SlideJob]:
        """Those that no twin of this job has finished since the rack was looked at."""
        found = {number: job for number, job in jobs.items() if store_fingerprint(job.out) == job.fingerprint}
        for number, job in found.items():
            figures = {"reused": True, "tiles": len(TileStore(job.tiles))}
            settle(self._results[number, job.slide_id], figures)
        return {number: job for number, job in jobs.items() if number not in found}

    def _one_batch(
        self, slide_id: str, source: Source, start: int, stains: dict[int, Callable[[Any], Any] | None]
    ) -> dict[int, np.ndarray | Exception]:
        """Features of a batch by encoder, or what went wrong in that encoder; an error in reading is raised."""
        found: dict[int, np.ndarray | Exception] = {}
        try:
            with isolation.working_on(slide_id):
                tiles = source.read(start, min(start + self._batch_size, len(source)))
                with isolation.unhurried():  # a large model on a CPU
                    for number, stain in stains.items():
                        try:
                            found[number] = self._models[number](tiles, stain).astype(self._dtype)
                        except RunError as error:  # no slide's fault, and nothing goes on
                            self._abandon(error)
                            raise
                        except Exception as error:  # of this encoder alone
                            found[number] = error
            self._progress(len(tiles) * len(stains))
            return found
        finally:
            self._slots.release()

    def _write(
        self, source: Source, jobs: dict[int, SlideJob], batches: queue.Queue[Future | None], started: float
    ) -> None:
        """Take a slide's batches to its outputs until there are no more: also after an error, or feeding would stop."""
        keys = {number: self._models[number].encoder.record.key for number in jobs}
        outputs = [
            Output(job, partial(self._output, number, job, source.store), keys[number], started)
            for number, job in jobs.items()
        ]
        while (batch := batches.get()) is not None:
            try:
                parts = batch.result()
            except Exception as error:  # in reading, or the engine was closed
                parts = dict.fromkeys(jobs, error)
            for number, output in zip(jobs, outputs, strict=True):
                output.add(parts.pop(number))
        source.close()
        for number, output in zip(jobs, outputs, strict=True):
            output.finish(self._results[number, jobs[number].slide_id])

    def _fail(self, jobs: dict[int, SlideJob], error: Exception) -> None:
        for number, job in jobs.items():
            settle(self._results[number, job.slide_id], error)


def settle(result: Future[dict[str, Any]], outcome: dict[str, Any] | Exception) -> None:
    """Tell who waits for a slide; the first outcome stays (when the run cannot go on, all have theirs)."""
    with suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            result.set_exception(outcome)
        else:
            result.set_result(outcome)


class Progress:
    """A line on the terminal every few seconds: tiles done, tiles per second, time left."""

    def __init__(self, total: int, every: float = 10.0):
        self.total, self.every, self.done = total, every, 0
        self._lock = threading.Lock()
        self.started = self.last = time.monotonic()

    def add(self, tiles: int) -> None:
        with self._lock:
            self.done += tiles
            now = time.monotonic()
            due = now - self.last >= self.every
            if due:
                self.last = now
        if due:
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / max(rate, 1e-9)
            log.info("embedding: %d of %d tiles, %.0f tiles/s, %.0f s left", self.done, self.total, rate, left)
