"""Which device a job computes on, and whose fault it is when one fails.

A local GPU job claims its device itself: Snakemake's local executor does not. `auto` takes the CPU where nobody spoke
of a GPU; where the plan of the run counted on one (`Promise`) a GPU that does not answer ends the job on a cluster, and
is said aloud on a workstation, because the CPU takes many times as long.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from slidemake.core.failures import RunError

log = logging.getLogger("slidemake")

Promise = Literal[
    "", "here", "cluster"
]  # who said that there is a GPU: nobody, this machine's driver, a cluster's queue

_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_DEVICE = ("CUDA error", "HIP error", "cuDNN error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "CUDA driver error", "NVRTC")


def nvidia_gpus() -> tuple[int, str | None]:
    """GPUs that NVIDIA's driver answers for on this machine, and why there is none although a driver is installed.

    Asked through NVML, without torch and without a context on the device. An empty CUDA_VISIBLE_DEVICES hides them all.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0, None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        installed = shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()
        return 0, f"its driver cannot be asked: {error}" if installed else None
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    count = ctypes.c_uint(0)
    code = nvml.nvmlInit_v2()
    if not code:
        code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    if code:
        return 0, f"its driver says: {nvml.nvmlErrorString(code).decode(errors='replace')}"
    return count.value, None


@contextmanager
def claimed_device(wanted: str = "auto", promise: Promise = "", folder: str | None = None) -> Iterator[str]:
    """Yield "cpu" or "cuda:<i>". On a machine with several GPUs every job gets one to itself while it runs.

    A claim is a file lock on the name of the device (its uuid: numbers are each job's own), so it ends with the process
    however that ends. Jobs beyond the number of devices wait. A job of Slurm's that sees one device was given it, and
    claims nothing. Raises RunError when "cuda" is asked for and there is none, and when a cluster promised one.
    """
    found = [] if wanted == "cpu" else cuda_devices()
    if isinstance(found, str):
        _without_gpu(wanted, promise, found)
        found = []
    if not found:
        yield "cpu"
        return
    if len(found) == 1 and os.environ.get("SLURM_JOB_ID"):
        yield _chosen(0)
        return
    root, told = Path(folder or tempfile.gettempdir()), False
    while True:
        for index, name in enumerate(found):
            with open(root / f"slidemake-{os.getuid()}-gpu-{name.replace('/', '_')}.lock", "w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield _chosen(index)
                return
        if not told:
            log.info("all %d GPUs are taken by other jobs: waiting for one", len(found))
            told = True
        time.sleep(1.0)


def cuda_devices() -> list[str] | str:
    """Names of the devices that CUDA really gives to this process, by index; or why there is none, in words.

    A name is the same in every process of the machine: the device's uuid, or that of the MIG slice. NVML, which counts
    devices in PyTorch, counts boards where CUDA gives one slice of one: each index is asked for.
    """
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names: list[str] = []
    for index in range(torch.cuda.device_count()):
        try:
            uuid = str(torch.cuda.get_device_properties(index).uuid)
        except (RuntimeError, AssertionError, AttributeError) as error:
            log.debug("GPU %d is not for this process: %s", index, error)
            break
        slice_of_mig = index < len(visible) and visible[index].strip().startswith("MIG-")
        names.append(visible[index].strip() if slice_of_mig else uuid)
    return names or "CUDA gives this process no device"


def _without_gpu(wanted: str, promise: Promise, why: str) -> None:
    """Say why there is no GPU, as loudly as somebody counted on one. RunError where that was a cluster, or the user."""
    node = socket.gethostname()
    if wanted == "cuda":
        raise RunError(
            f"embedding.device is cuda, but PyTorch has no CUDA device on {node}: {why}. Mend that, or use auto or cpu."
        )
    if promise == "cluster":
        raise RunError(
            f"The GPU of node {node} does not answer: {why}. Run again without that node (Slurm: --exclude={node}), or "
            "set embedding.device: cpu if this cluster has no GPUs. Finished slides are kept."
        )
    if promise == "here":
        log.warning("the GPU of this machine cannot be used, so the CPU is, which takes many times as long: %s", why)


def _chosen(index: int) -> str:
    """Make a device the current one of this thread: memory that nobody placed would otherwise go to the first."""
    device = f"cuda:{index}"
    use_device(device)
    return device


def use_device(device: str) -> None:
    """Make a GPU the current one of the calling thread; every new thread begins with the first."""
    if device != "cpu":
        import torch

        torch.cuda.set_device(torch.device(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU (also where a library of CUDA's says so in its own words) or on the CPU."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words.lower() in text.lower() for words in _MEMORY)


def is_device_failure(error: BaseException) -> bool:
    """Whether a GPU or its driver failed: after that nothing works in this process, and no slide is to blame."""
    import torch

    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)
    )
