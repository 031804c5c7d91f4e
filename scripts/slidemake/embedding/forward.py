"""Batches of tiles through an encoder: their place on the device, and what happens when one fails there.

On a GPU a batch takes one of two slots, each with a stream of its own, page-locked memory for both ways, and an event
on which the thread sleeps (PyTorch's own waiting spins, which costs a core for each batch). The slots are of the job,
not of its threads or encoders: two batches at most are in the GPU's memory, however many threads read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np

from slidemake.core.failures import RunError
from slidemake.jobs.devices import is_device_failure, is_out_of_memory, use_device

log = logging.getLogger("slidemake")

ON_GPU = 2  # batches on the GPU at a time: one is copied while the other is computed
Stain = Callable[[Any], Any] | None


class Slot:
    """A batch's place on a device: `on_device` brings tiles there, `fetched` brings features back.

    `within()` is the context in which all work of the slot is done (its stream), `event` has `record()` and a
    `synchronize()` that sleeps. Without an event nothing has to be waited for (the CPU), and nothing is copied.
    """

    def __init__(
        self,
        device: str,
        event: Any = None,
        within: Callable[[], AbstractContextManager] = nullcontext,
        pinned: bool = False,
    ):
        self.device, self.within, self._event, self._pinned = device, within, event, pinned
        self._held: dict[str, Any] = {}  # page-locked memory of the way in and of the way out

    def _memory(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """At least `shape[0]` rows of page-locked memory, kept for the next batch."""
        import torch

        held = self._held.get(name)
        if held is None or held.shape[1:] != shape[1:] or len(held) < shape[0]:
            self._held.pop(name, None)
            held = self._held[name] = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
        return held[: shape[0]]

    def on_device(self, tiles: np.ndarray, size: int) -> Any:
        """(size, H, W, 3) uint8 on the device, repeating the last tile to fill `size`. Free again once the features of
        this batch have been fetched.
        """
        import torch

        if self._event is None and size == len(tiles):
            return torch.from_numpy(tiles).to(self.device)
        held = self._memory("in", (size, *tiles.shape[1:]), torch.uint8)
        held[: len(tiles)].copy_(torch.from_numpy(tiles))
        held[len(tiles) :] = held[len(tiles) - 1]
        return held.to(self.device, non_blocking=True)

    def fetched(self, features: Any) -> np.ndarray:
        """Features (n, D) as float32 on the CPU, once they are computed."""
        import torch

        features = features.to(torch.float32)
        if self._event is None:
            return features.cpu().numpy()
        out = self._memory("out", tuple(features.shape), torch.float32)
        out.copy_(features, non_blocking=True)
        self._event.record()
        self._event.synchronize()
        return out.numpy().copy()


def gpu_slot(device: str) -> Slot:
    """A slot on a CUDA device, with a stream of its own."""
    import torch

    stream = torch.cuda.Stream(torch.device(device))
    return Slot(device, torch.cuda.Event(blocking=True), partial(torch.cuda.stream, stream), pinned=True)


class Slots:
    """The slots of a job, shared by its encoders and threads. On the CPU there are as many as somebody asks for."""

    def __init__(self, device: str, free: list[Slot] | None = None):
        self.device, self._made = device, free is not None or device == "cpu"
        self._free = list(free or [])
        self.count = len(self._free) if self._made else ON_GPU  # 0: no limit
        self._changed, self._whole = threading.Condition(), threading.Lock()

    def _take(self) -> Slot:
        with self._changed:
            if not self._made:  # by the first batch, when the device is set and the weights are there
                self._free, self._made = [gpu_slot(self.device) for _ in range(self.count)], True
            self._changed.wait_for(lambda: bool(self._free))
            return self._free.pop()

    def _give(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    @contextmanager
    def one(self) -> Iterator[Slot]:
        """A slot for a batch, as soon as one is free."""
        if not self.count:
            yield Slot(self.device)
            return
        slot = self._take()
        try:
            yield slot
        finally:
            self._give(slot)

    @contextmanager
    def alone(self) -> Iterator[Slot]:
        """A slot while no other batch is on the device."""
        with self._whole, ExitStack() as taken:
            slots = [taken.enter_context(self.one()) for _ in range(max(1, self.count))]
            yield slots[0]


class Forward:
    """Runs batches of tiles through an encoder, from several threads; when memory runs out, in halves from then on."""

    def __init__(self, encoder: Any, device: str, batch: int, slots: Slots | None = None):
        self.encoder, self.device, self.batch, self.limit = encoder, device, batch, 10**9
        self.slots = slots or Slots(device)
        # a compiled model is compiled for one shape: a batch that is not full is filled up
        self.fixed = encoder.path_name == "compiled"

    def __call__(self, tiles: np.ndarray, stain: Stain) -> np.ndarray:
        """Features (n, D) float32 of tiles (n, H, W, 3) uint8.

        RunError where one tile does not fit into the memory, or the device fails: neither is a slide's fault.
        """
        parts, done = [], 0
        while done < len(tiles):
            part = tiles[done : done + self.limit]
            features, why = self._tried(part, stain, self.slots.one)
            if features is None and self.slots.count > 1:  # often it was the neighbour's batch that was in the way
                features, why = self._tried(part, stain, self.slots.alone)
            if features is None:
                self._lower(len(part), why)
                continue
            parts.append(features)
            done += len(part)
        return np.concatenate(parts)

    def warm_up(self) -> None:
        """Have a compiled model compiled, by one thread that is like those that will use it: two would both compile."""
        if not self.fixed:
            return
        side = self.encoder.record.tile_px
        blank = np.zeros((self.batch, side, side, 3), np.uint8)
        with ThreadPoolExecutor(1, initializer=prepare_thread, initargs=(self.device,)) as pool:
            pool.submit(self, blank, None).result()

    def _tried(
        self, tiles: np.ndarray, stain: Stain, place: Callable[[], AbstractContextManager[Slot]]
    ) -> tuple[np.ndarray | None, str]:
        """Features of a batch; None where memory ran out, with its message.

        What went wrong is judged when the exception is over: until then its traceback holds the batch that failed, and
        to give back memory gives back none.
        """
        trouble: Literal["", "memory", "device"] = ""
        why = ""
        with place() as slot:
            try:
                return self._part(slot, tiles, stain), ""
            except (RuntimeError, MemoryError) as error:
                trouble = "memory" if is_out_of_memory(error) else "device" if is_device_failure(error) else ""
                if not trouble:
                    raise
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if trouble == "device":
                raise RunError(
                    f"{self.device} failed while {self.encoder.record.key} worked ({why}). Run the same command again: "
                    "finished slides are kept. If it comes again, look at the GPU (nvidia-smi, dmesg) or leave it out."
                )
            _give_back_memory(self.device)
        return None, why

    def _part(self, slot: Slot, tiles: np.ndarray, stain: Stain) -> np.ndarray:
        size = self.batch if self.fixed and self.limit >= self.batch else len(tiles)
        with slot.within():
            batch = slot.on_device(tiles, size)
            features = self.encoder.forward(batch.permute(0, 3, 1, 2), stain=stain)
            return slot.fetched(features[: len(tiles)])

    def _lower(self, size: int, why: str) -> None:
        key = self.encoder.record.key
        if size == 1:
            remedy = (
                "Give the job more memory (--set-resources embed_tiles:mem_mb=...) or fewer threads"
                if self.device == "cpu"
                else "Leave the GPU to this job alone, or take one with more memory"
            )
            raise RunError(f"{key} does not fit into the memory of {self.device} with one tile ({why}). {remedy}.")
        self.limit = min(self.limit, (size + 1) // 2)
        log.warning("%s: out of memory with %d tiles at a time: going on with %d", key, size, self.limit)


def _give_back_memory(device: str) -> None:
    """What PyTorch keeps of a GPU's memory for later goes back, so that a smaller batch finds it in one piece."""
    import torch

    if device != "cpu":
        torch.cuda.empty_cache()


def prepare_thread(device: str = "cpu") -> None:
    """For threads that work on batches: its GPU is the current one; on the CPU batches run side by side with one thread
    each, because layers of a small model are too short to be worth splitting, and features then do not depend on the
    number of threads.
    """
    import torch

    torch.set_num_threads(1)
    use_device(device)
