"""Which device a job computes on. A local GPU job claims its device itself: Snakemake's local executor does not."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slidemake.core.failures import RunError

log = logging.getLogger("slidemake")


@contextmanager
def claimed_device(wanted: str = "auto", folder: str | None = None) -> Iterator[str]:
    """Yield "cpu" or "cuda:<i>". On a machine with several GPUs every job gets one to itself while it runs.

    A claim is a file lock, so it ends with the process however that ends. Jobs beyond the number of devices wait.
    Raises RunError when "cuda" is asked for and there is none.
    """
    import torch

    count = torch.cuda.device_count() if wanted in ("auto", "cuda") else 0
    if count == 0:
        if wanted == "cuda":
            raise RunError("embedding.device is cuda, but PyTorch sees no CUDA device here. Use auto or cpu.")
        yield "cpu"
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    root = Path(folder or tempfile.gettempdir())
    told = False
    while True:
        for index in range(count):
            physical = visible[index] if index < len(visible) and visible[index] else str(index)
            with open(root / f"slidemake-{os.getuid()}-gpu-{physical.replace('/', '_')}.lock", "w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield f"cuda:{index}"
                return
        if not told:
            log.info("all %d GPUs are taken by other jobs: waiting for one", count)
            told = True
        time.sleep(1.0)
