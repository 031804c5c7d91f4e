"""Batches on a device that is a stand-in on the CPU: slots, memory that runs out, a device that fails."""

import gc
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from slidemake.core.failures import RunError
from slidemake.embedding import forward as forward_module
from slidemake.embedding.forward import ON_GPU, Forward, Slot, Slots
from toy_encoder import ToyEncoder, expected

TILES = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3)).astype(np.uint8)


class Event:
    """Of a stream: what was recorded has to be waited for before anything is read."""

    def __init__(self):
        self.calls = []

    def record(self):
        self.calls.append("record")

    def synchronize(self):
        self.calls.append("synchronize")


class Place:
    """Two slots of a stand-in for a GPU; `inside` counts the batches that are on it."""

    def __init__(self, count=ON_GPU):
        self.inside = self.most = 0
        self.lock, self.events = threading.Lock(), [Event() for _ in range(count)]
        self.slots = Slots("cpu", [Slot("cpu", event, self.within) for event in self.events])

    @contextmanager
    def within(self):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1


def test_features_come_back_through_the_slots_memory_when_the_event_has_come():
    place = Place(1)
    forward = Forward(ToyEncoder(), "cpu", 4, place.slots)
    first = forward(TILES[:4], None)
    second = forward(TILES[3:], None)
    np.testing.assert_allclose(first, expected(TILES[:4]), rtol=1e-5)  # not overwritten by the second
    np.testing.assert_allclose(second, expected(TILES[3:]), rtol=1e-5)
    assert place.events[0].calls == ["record", "synchronize"] * 2


def test_the_way_in_is_the_same_memory_for_every_batch():
    slot = Slot("cpu", Event())
    first, second = slot.on_device(TILES[:4], 4), slot.on_device(TILES[:2], 3)
    assert first.data_ptr() == second.data_ptr()
    np.testing.assert_array_equal(second.numpy(), TILES[[0, 1, 1]])  # filled up with the last tile
    assert slot.on_device(TILES, 7).shape[0] == 7


class Meeting(ToyEncoder):
    """Waits in every batch until `count` batches are on the device, or a while has passed."""

    def __init__(self, count):
        super().__init__()
        self.barrier = threading.Barrier(count)

    def forward(self, batch, stain=None):
        self.barrier.wait(60)
        return super().forward(batch, stain)


def test_two_batches_are_on_the_device_whoever_sends_them():
    """Six threads and two encoders share two slots; the barrier is passed only when both are used."""
    place, encoder = Place(), Meeting(2)
    models = [Forward(encoder, "cpu", 4, place.slots) for _ in range(2)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: models[i % 2](TILES[:4], None), range(12)))
    assert place.most == 2
    assert all(np.array_equal(features, found[0]) for features in found)


class Crowded(ToyEncoder):
    """Has memory for one batch at a time, whatever its size."""

    def __init__(self, place):
        super().__init__()
        self.place, self.refused = place, threading.Event()

    def forward(self, batch, stain=None):
        if self.place.inside > 1:
            self.refused.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch, stain)


def test_a_batch_that_finds_no_memory_beside_another_is_tried_alone_before_it_is_halved():
    place = Place()
    encoder = Crowded(place)
    forward = Forward(encoder, "cpu", 4, place.slots)
    occupied, free = threading.Event(), threading.Event()

    def neighbour():
        with place.slots.one() as slot, slot.within():
            occupied.set()
            free.wait(60)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(neighbour)
        occupied.wait(60)
        ours = pool.submit(forward, TILES[:4], None)
        assert encoder.refused.wait(60)
        free.set()
        np.testing.assert_allclose(ours.result(60), expected(TILES[:4]), rtol=1e-5)
        other.result(60)
    assert encoder.batches == [4]
    assert forward.limit > 4


def test_what_failed_is_gone_when_memory_is_given_back(monkeypatch):
    """Inside the `except` its traceback would still hold the batch, and nothing would be free."""
    held, alive = [], []

    class Full(ToyEncoder):
        def forward(self, batch, stain=None):
            activations = batch.float() * 2
            if len(batch) > 2:
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(batch, stain)

    gc.disable()  # it has to be gone by itself
    try:
        monkeypatch.setattr(forward_module, "_give_back_memory", lambda device: alive.append(held[-1]() is not None))
        features = Forward(Full(), "cpu", 8)(TILES, None)
    finally:
        gc.enable()
    np.testing.assert_allclose(features, expected(TILES), rtol=1e-5)
    assert alive == [False, False]


def test_a_device_that_fails_ends_the_run_with_its_own_words():
    class Broken(ToyEncoder):
        def forward(self, batch, stain=None):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors")

    forward = Forward(Broken(), "cpu", 4, Place().slots)
    with pytest.raises(RunError, match=r"illegal memory access was encountered.*finished slides are kept"):
        forward(TILES, None)
    assert forward.limit > 7  # nothing was halved


def test_one_tile_that_does_not_fit_is_the_runs_problem():
    with pytest.raises(RunError, match="does not fit into the memory of cpu with one tile"):
        Forward(ToyEncoder(0), "cpu", 4)(TILES, None)


def test_a_compiled_model_is_compiled_by_one_thread_like_those_that_use_it():
    seen = queue.SimpleQueue()

    class Compiled(ToyEncoder):
        path_name = "compiled"

        def forward(self, batch, stain=None):
            seen.put((tuple(batch.shape), torch.get_num_threads(), threading.current_thread().name))
            return super().forward(batch, stain)

    Forward(Compiled(), "cpu", 5).warm_up()
    shape, threads, name = seen.get_nowait()
    assert (shape, threads) == ((5, 3, 16, 16), 1)
    assert name != threading.current_thread().name
    Forward(ToyEncoder(), "cpu", 5).warm_up()
    assert seen.empty()
