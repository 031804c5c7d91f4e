"""What a plan means for slides: Snakemake counts jobs, and a job holds a rack."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path


def slides_in_plan(racks: Mapping[str, Collection[str]], planned: Iterable[str], results: Path) -> str | None:
    """A sentence on how many slides a plan computes; None where there are none.

    racks: {rack: slide ids}. planned: racks of which a job is to run. A slide without a folder in `results` is new.
    What a rack's job finds finished only the job itself can tell, by fingerprints: of the others it is said that they
    are looked at.
    """
    total = sum(map(len, racks.values()))
    looked = [slide_id for rack in sorted(set(planned) & set(racks)) for slide_id in racks[rack]]
    if not total:
        return None
    try:
        known = {entry.name for entry in os.scandir(results / "slides")}
    except OSError:
        known = set()
    new = sum(slide_id not in known for slide_id in looked)
    again, left = len(looked) - new, total - len(looked)
    parts = [f"{new:,} are new and will be computed"] if new else []
    parts += (
        [f"{again:,} will be looked at (computed where a change concerns them, else found finished)"] if again else []
    )
    parts += [f"{left:,} are not concerned"] if left else []
    return f"of {total:,} slides {', '.join(parts)}"
