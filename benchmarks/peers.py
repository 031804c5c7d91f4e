"""Running peers (`peer.py`) in environments of their own, in turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Timed

SCRIPT = Path(__file__).with_name("peer.py")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
TITLES = {"lazyslide": "LazySlide", "slide2vec": "slide2vec", "tiatoolbox": "TIAToolbox feature extractor"}


class PeerFailed(RuntimeError):
    """A peer that is installed did not run to the end."""


def find(pythons: Sequence[str]) -> dict[str, dict[str, str]]:
    """The peers that these interpreters have: name -> {"python", "version"}; the first that has one is taken."""
    found: dict[str, dict[str, str]] = {}
    for python in pythons:
        for name, version in _run(python, [], malloc=False).items():
            found.setdefault(name, {"python": python, "version": version})
    return found


def measure_once(peers: dict[str, Any], name: str, arguments: Sequence[str], malloc: bool, into: Timed) -> None:
    """One run of a peer added to `into`. PeerFailed with its own last words when it fails."""
    found = _run(peers[name]["python"], [name, *arguments], malloc)
    into.wall.append(found["tiles"] / max(found["seconds"], 1e-9))
    into.cpu.append(found["tiles"] / max(found["cpu"], 1e-6))


def embed_once(peers: dict[str, Any], name: str, slide: str, malloc: bool, into: Timed) -> None:
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        measure_once(peers, name, [slide, folder], malloc, into)


def _run(python: str, arguments: Sequence[str], malloc: bool) -> dict[str, Any]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "PYTHONPATH", "OMP_NUM"))}
    command = [python, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=kept | (MALLOC if malloc else {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerFailed(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
