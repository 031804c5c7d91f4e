"""What becomes of each slide when the job of its rack runs, as far as a plan can tell without opening a store.

A rack's outcome keeps two digests of each slide: `surely` is over what cannot change without the slide being computed
again (the stage's options and version, its mpp and sha256, the lengths of its files), `all` over everything that the
job depends on, times and paths and machines included. Where `all` is what it was the slide is found finished, where
`surely` is not it is computed; between the two only the job can tell, by its fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slidemake.core.currency import NOT_DETERMINING, Outcome, Tree, digest_of

COMPUTED, LOOKED, FOUND, FAILED, LEFT = "computed", "looked at", "found", "failed", "left"
FATES = (COMPUTED, LOOKED, FAILED, FOUND, LEFT)  # over several stages the first of them counts
SURE = ("options", "version")  # params that shape every slide
HOW = {"batch_size", "device", "compile"}  # options that say how to compute, and not what
SURE_OF_ROW = ("mpp", "sha256")
Digests = dict[str, list[str]]  # {slide: [surely, all]}


def slide_digests(
    outcome: Outcome,
    params: Mapping[str, Any],
    slides: Iterable[str],
    owners: Mapping[str, str],
    before: Iterable[Digests],
    others: Iterable[str],
) -> Digests:
    """Digests of the slides of one rack at one stage.

    params: of the job. owners: {file of the user's: slide}. before: digests of the rack at the stages that this one
    follows. others: digests of the other outcomes that it is made from.
    """
    slides, before = list(slides), list(before)
    own: dict[str, list[Any]] = {slide: [] for slide in slides}
    sure: dict[str, list[Any]] = {slide: [] for slide in slides}
    common: list[Any] = [sorted(others)]
    options: list[Any] = []
    for name, value in sorted(params.items()):
        if name in NOT_DETERMINING:
            continue
        parts = _by_slide(value, own)
        if parts is None:
            common.append([name, outcome.settings[name]])
        if name in SURE:
            options.append({k: v for k, v in value.items() if k not in HOW} if isinstance(value, dict) else value)
        for slide, part in (parts or {}).items():
            own[slide].append([name, part])
            if isinstance(part, dict):
                sure[slide] += [[key, part[key]] for key in SURE_OF_ROW if part.get(key)]
    for path, identity in sorted(outcome.read.items()):
        if (slide := owners.get(path, "")) in own:
            own[slide].append([path, identity])
            length = identity.split(" ")[0]
            sure[slide].append(length if length.isdigit() or length == "absent" else "")
        else:
            common.append([path, identity])
    found = {}
    for slide in slides:
        known = [digests.get(slide, ["", ""]) for digests in before]
        surely = digest_of([options, sure[slide], [one for one, _ in known]])
        everything = digest_of([common, options, own[slide], [two for _, two in known]])
        found[slide] = [surely[:12], everything[:12]]
    return found


def _by_slide(value: Any, slides: Mapping[str, Any]) -> dict[str, Any] | None:
    """{slide: its part} of a value that has one for each of some slides of the rack; None of one that has not."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, dict) and "slide_id" in item for item in value):
        value = {item["slide_id"]: item for item in value}
    return value if isinstance(value, dict) and set(value) <= set(slides) else None


def fates(
    now: Digests, record: Mapping[str, Any] | None, tree: Tree, before: Iterable[Mapping[str, str]] = ()
) -> dict[str, str]:
    """{slide: what becomes of it} in a job that is to run.

    record: what is kept of its outcome, if anything is. before: fates at the stages that it follows: what fails there
    is not worked on here.
    """
    kept = (record or {}).get("slides") or {}
    finished: dict[str, bool] = {}
    for pattern, slides in (record or {}).get("vouches", {}).items():
        for slide in slides:
            finished[slide] = finished.get(slide, True) and tree.has(pattern.replace("{slide}", slide))
    found = {}
    for slide, (surely, everything) in now.items():
        if any(fate.get(slide) == FAILED for fate in before):
            found[slide] = FAILED
        elif slide not in kept:
            found[slide] = LOOKED
        elif kept[slide][1] == everything:
            found[slide] = FAILED if slide not in finished else FOUND if finished[slide] else COMPUTED
        else:
            found[slide] = LOOKED if kept[slide][0] == surely and finished.get(slide, True) else COMPUTED
    return found


def fates_of_current(slides: Iterable[str], record: Mapping[str, Any] | None) -> dict[str, str]:
    """{slide: what became of it} in a job that need not run."""
    vouched = {slide for known in (record or {}).get("vouches", {}).values() for slide in known}
    return {slide: FOUND if slide in vouched else FAILED for slide in slides}
