"""Devices: who gets which, what is said where there is none, and which errors are a device's. Devices are stand-ins."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slidemake.core.failures import RunError
from slidemake.jobs import devices
from slidemake.jobs.devices import claimed_device, cuda_devices, is_device_failure, is_out_of_memory, nvidia_gpus

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(*uuids)`: CUDA gives this process these devices, NVML counts `boards`. Returns those made current."""
    current = []

    def install(*uuids, boards=None):
        def properties(index):
            if index >= len(uuids):
                raise torch.AcceleratorError("CUDA error: invalid device ordinal")
            return SimpleNamespace(uuid=uuids[index])

        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids) if boards is None else boards)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
        return current

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return install


@pytest.fixture
def broken(monkeypatch):
    def fail():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "init", fail)


def test_where_nobody_spoke_of_a_gpu_the_device_is_the_cpu(broken, caplog):
    with claimed_device("auto") as device:
        assert device == "cpu"
    assert not caplog.records
    with pytest.raises(RunError, match="no CUDA device"), claimed_device("cuda"):
        pass


def test_a_gpu_that_does_not_answer_is_told_of_on_a_workstation(broken, caplog):
    with claimed_device("auto", "here") as device:
        assert device == "cpu"
    (record,) = caplog.records
    assert (record.levelname, "driver on your system is too old" in record.message) == ("WARNING", True)


def test_a_gpu_that_does_not_answer_ends_a_clusters_job_with_the_name_of_the_node(broken):
    with pytest.raises(RunError, match="too old") as caught, claimed_device("auto", "cluster"):
        pass
    assert socket.gethostname() in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pytorch_without_cuda_says_so(monkeypatch):
    def fail():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert cuda_devices() == "Torch not compiled with CUDA enabled"


def test_cpu_asks_for_no_gpu(broken):
    with claimed_device("cpu", "cluster") as device:
        assert device == "cpu"


def test_boards_that_nvml_counts_and_cuda_does_not_give_are_no_devices(gpus, monkeypatch):
    gpus("GPU-1", boards=4)
    assert cuda_devices() == ["GPU-1"]
    gpus(boards=2)
    assert cuda_devices() == "CUDA gives this process no device"


def test_slices_of_a_board_have_names_of_their_own(gpus, monkeypatch):
    gpus("GPU-1")
    for own in ("MIG-a", "MIG-b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
        assert cuda_devices() == [own]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert cuda_devices() == ["GPU-1"]


def test_two_jobs_that_both_call_their_gpu_0_do_not_wait_for_one_another(gpus, tmp_path):
    """As Slurm's jobs on one node do: the number is each job's own, the uuid is the device's."""
    current = gpus("GPU-1")
    with claimed_device("auto", "cluster", str(tmp_path)) as one:
        gpus("GPU-2")
        with claimed_device("auto", "cluster", str(tmp_path)) as two:
            assert (one, two) == ("cuda:0", "cuda:0")
    assert current == ["cuda:0", "cuda:0"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_job_of_slurms_with_one_device_claims_nothing(gpus, tmp_path, monkeypatch):
    gpus("GPU-1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with claimed_device("auto", "cluster", str(tmp_path)), claimed_device("auto", "cluster", str(tmp_path)) as two:
        assert two == "cuda:0"
    assert list(tmp_path.iterdir()) == []


CLAIM = """
import sys, time, pathlib, torch
from types import SimpleNamespace
from slidemake.jobs.devices import claimed_device
torch.cuda.init = lambda: None
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"GPU-{index}")
torch.cuda.set_device = lambda device: None
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with claimed_device("auto", "here", str(folder)) as device:
    (folder / f"{name}.claim").write_text(device)
    while not (folder / "release").exists():
        time.sleep(0.05)
"""


def claims(folder, count):
    """{job: device} once `count` jobs have one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = {path.stem: path.read_text() for path in folder.glob("*.claim")}
        if len(found) >= count and all(found.values()):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} claims did not come")


@pytest.mark.skipif(sys.platform != "linux", reason="file locks are tested on Linux")
def test_every_job_gets_a_gpu_to_itself(tmp_path):
    """Three jobs, two GPUs: two get one each, the third when one of them ends, even by being killed."""
    scripts = Path(__file__).parents[3] / "scripts"
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    jobs = {name: subprocess.Popen([*command, name], env=environment) for name in "abc"}
    try:
        two = claims(tmp_path, 2)
        assert sorted(two.values()) == ["cuda:0", "cuda:1"]
        killed = next(iter(two))
        jobs[killed].kill()
        three = claims(tmp_path, 3)
        third = (set(three) - set(two)).pop()
        assert three[third] == two[killed]
        (tmp_path / "release").touch()
        assert [jobs[name].wait(60) for name in set("abc") - {killed}] == [0, 0]
    finally:
        for process in jobs.values():
            process.kill()


class Nvml:
    """NVIDIA's library as ctypes gives it: `code` is what it answers."""

    def __init__(self, code=0, boards=3):
        self.nvmlInit_v2, self.nvmlShutdown = lambda: code, lambda: 0
        self.nvmlErrorString = lambda code: b"Driver/library version mismatch"
        self._boards = boards

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802 (NVML calls it so)
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = self._boards
        return 0


def test_the_driver_is_asked_how_many_gpus_there_are(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    assert nvidia_gpus() == (3, None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(18))
    assert nvidia_gpus() == (0, "its driver says: Driver/library version mismatch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia_gpus() == (0, None)  # hidden on purpose


def test_without_the_drivers_library_a_machine_has_no_gpu_and_says_so_only_where_a_driver_is(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    count, why = nvidia_gpus()
    assert (count, "cannot open shared object file" in why) == (0, True)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setattr(devices.Path, "exists", lambda self: False)
    assert nvidia_gpus() == (0, None)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    MemoryError(),
]
DEVICE = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("HIP error: the operation cannot be performed in the present state"),
]
OTHER = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error"), OSError("out of memory")]


@pytest.mark.parametrize("error", [*MEMORY, *DEVICE, *OTHER], ids=lambda error: str(error)[:40])
def test_memory_that_runs_out_a_device_that_fails_and_other_errors_are_told_apart(error):
    assert (is_out_of_memory(error), is_device_failure(error)) == (error in MEMORY, error in DEVICE)
