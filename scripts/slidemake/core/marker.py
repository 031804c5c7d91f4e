"""slidemake.json in a results folder: the version of its format, and how its slides were put into racks.

Damage is not absence: racks that were sized anew would move slides between jobs, and every model would be trained
again. A damaged marker stops the run; one that is absent is inferred from the manifests that lie beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import read_json, read_json_if_whole

MARKER = "slidemake.json"


def read_marker(output: str | Path) -> dict[str, Any]:
    """What slidemake.json says; nothing where there is none. RunError, with the remedy, for one that is damaged."""
    path = Path(output) / MARKER
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise SlideFailure("damaged", f"{path} is no JSON object")
    except SlideFailure as failure:
        size = inferred_rack_size(output)
        kept = f" (its racks hold {size} slides, which is kept)" if size else ""
        raise RunError(
            f"{failure}. It says how the slides were put into racks. Delete {path} and give the same command again: it "
            f"is made anew from the manifests beside it{kept}."
        ) from failure
    return found


def inferred_rack_size(output: str | Path) -> int | None:
    """Slides per rack of the results that are there, by their manifests: all racks but the last are full.

    None where there are none, or none that can be read.
    """
    paths = sorted((Path(output) / "manifests" / "screen").glob("r*.json"))
    manifests = [read_json_if_whole(path) for path in paths]
    sizes = [len(found["slides"]) for found in manifests if isinstance(found, dict) and "slides" in found]
    return max(sizes, default=0) or None
