"""What a plan means for slides: Snakemake counts jobs, and a job holds a rack."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from slidemake.workflow.slide_fates import COMPUTED, FAILED, FATES, FOUND, LEFT, LOOKED

WORDS = {
    COMPUTED: "will be computed",
    LOOKED: "will be looked at (computed where a change concerns them, else found finished)",
    FOUND: "will be found finished",
    FAILED: "failed, and nothing has changed of them",
    LEFT: "are not concerned",
}


def slides_in_plan(
    racks: Mapping[str, Collection[str]], planned: Iterable[Mapping[str, str]], results: Path
) -> str | None:
    """A sentence on what a plan does with slides; None where there are none.

    racks: {rack: slide ids}. planned: of each job of a rack that is to run, {slide: fate}. A slide without a folder in
    `results` is new.
    """
    total = sum(map(len, racks.values()))
    if not total:
        return None
    try:
        known = {entry.name for entry in os.scandir(results / "slides")}
    except OSError:
        known = set()
    fate = {slide_id: LEFT for slides in racks.values() for slide_id in slides}
    for told in planned:
        for slide_id, one in told.items():
            one = one if slide_id in known else COMPUTED
            fate[slide_id] = min(fate[slide_id], one, key=FATES.index)
    counts = Counter(fate.values())
    new = sum(one == COMPUTED and slide_id not in known for slide_id, one in fate.items())
    parts = [f"{counts[one]:,} {words}" for one, words in WORDS.items() if counts[one]]
    if new:
        parts[0] += f" ({new:,} of them new)" if new < counts[COMPUTED] else " for the first time"
    return f"of {total:,} slides {', '.join(parts)}"
