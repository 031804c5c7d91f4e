"""Memory: how much a process has, how much is left to it, when it must be stopped, and how it is allocated."""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
RESERVE = 0.05  # share of the memory that must stay free
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of <malloc.h>

log = logging.getLogger(__name__)


def private_mb(pid: int) -> int:
    """Memory in MB that a process has to itself (resident, without files that are mapped); 0 when it is gone."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE >> 20


def machine_mb() -> tuple[int, int]:
    """Memory of the machine in MB: all, and what programs could still get."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        found[name] = int(value.split()[0]) >> 10
    return found["MemTotal"], found["MemAvailable"]


@dataclass(frozen=True)
class Cgroup:
    """The control group with the tightest limit that this process is in: a cluster's job, or a container."""

    limit_mb: int
    folder: Path

    def used_mb(self) -> int:
        """Memory of its processes, without the cache of files, which the system takes back by itself."""
        values = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(values.get("anon", values.get("total_rss", 0))) >> 20


def own_cgroup(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> Cgroup | None:
    """The tightest memory limit above this process; None where there is none. Reads both versions of cgroups."""
    found: list[Cgroup] = []
    try:
        lines = [line.split(":", 2) for line in listing.read_text().splitlines()]
    except FileNotFoundError:
        return None
    for number, controllers, place in lines:
        if number == "0" and not controllers:
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / place.lstrip("/")
        for at in (folder, *folder.parents):
            limit = _limit_mb(at / name)
            if limit is not None:
                found.append(Cgroup(limit, at))
            if at == base:
                break
    return min(found, key=lambda group: group.limit_mb, default=None)


def _limit_mb(path: Path) -> int | None:
    try:
        value = path.read_text().strip()
    except OSError:
        return None
    return int(value) >> 20 if value.isdecimal() and int(value) < 1 << 60 else None


@dataclass(frozen=True)
class MemoryWatch:
    """When a job's process must be stopped.

    In a control group with a limit: when it is full but for `RESERVE`, and the process holds most of it. On the machine
    as a whole: when the machine is as full, and the process has more than its rule declares (`declared_mb`); a job that
    keeps to what it declares is never stopped for what others take.
    """

    declared_mb: int | None
    cgroup: Cgroup | None

    @classmethod
    def here(cls, declared_mb: int | None) -> MemoryWatch:
        return cls(declared_mb, own_cgroup())

    def too_much(self, pid: int) -> int | None:
        """Size of the process in MB when it must be stopped now, else None."""
        total, available = machine_mb()
        low = available < RESERVE * total
        group = self.cgroup
        if not low and group is None:
            return None
        size = private_mb(pid)
        if low and size > (self.declared_mb or 0):
            return size
        if group and size > group.limit_mb / 2 and group.used_mb() > (1 - RESERVE) * group.limit_mb:
            return size
        return None


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory in the process. True if it agreed; False on another C library.

    By default every large activation is mapped, faulted in page by page and unmapped again, at every layer: half of the
    CPU time of a small encoder. So is every stored tile that a slide is read from: a tenth of its reading. The price is
    resident memory that does not shrink until the process ends. Calling it twice is harmless.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
    # both return 1 on success; the trim threshold is an int, so its largest value is "never"
    done = [libc.mallopt(_M_MMAP_MAX, 0), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]
    # threads share one arena: those of their own are mapped in pieces too small for activations, and given back
    done.append(libc.mallopt(_M_ARENA_MAX, 1))
    if done != [1, 1, 1]:
        log.warning("mallopt refused (%s): it will be slower than it could be", done)
    return done == [1, 1, 1]
