"""Whose a bundle is: task, model, repeat and fold it was trained for, and the patients that it has seen. No torch here.

A bundle is refused in another's place. Two fold bundles that changed places would predict and explain patients with
models that were trained on them, and every figure would look well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import check_place, placed, read_json_if_whole

JSON = "bundle.json"


def about_place(folder: str | Path) -> dict[str, str]:
    """What bundle.json says of its place: `place`, its path inside of the results, and `task` and `model` by name."""
    place = placed(Path(folder) / JSON)
    parts = place.get("place", "").split("/")
    return {**place, "task": parts[1], "model": parts[2]} if parts[0] == "tasks" and len(parts) > 3 else place


def misplaced(folder: str | Path, info: Mapping[str, Any], of_run: bool) -> str | None:
    """Why a bundle is not the one of this folder, or None.

    of_run: the folder is one of the run's own results, and the bundle must have been written there. Otherwise it may
    have been copied to anywhere, and is compared with the train.json of its model, where that lies beside it.
    """
    folder = Path(folder)
    if of_run:
        try:
            check_place(folder / JSON, info)
        except SlideFailure as failure:
            return failure.message
        return None
    model = folder.parent if folder.name == "bundle" else folder.parent.parent
    trained = read_json_if_whole(model / "train.json")
    told, place = (trained or {}).get("place"), info.get("place")
    if told and place and str(Path(place).parent) != str(Path(told).parent / folder.relative_to(model)):
        return f"{folder / JSON} was written as {place}, and the train.json beside it as {told}"
    return None


def check_bundle_place(folder: str | Path, info: Mapping[str, Any], of_run: bool) -> None:
    """RunError for a bundle in another's place, with what to do."""
    if why := misplaced(folder, info, of_run):
        remedy = f"Delete {folder} and give the same command again" if of_run else "Copy the whole folder again"
        raise RunError(f"{why}. A model in another's place would be tested on its own training patients. {remedy}.")


def trained_on(info: Mapping[str, Any]) -> set[str]:
    """Patients that a bundle was fitted to, or that decided when to stop, its temperature or its threshold."""
    training = info.get("training") or {}
    return {patient for key in ("patients", "train", "val") for patient in training.get(key) or ()}


def check_unseen(patients: Iterable[str], info: Mapping[str, Any], what: str) -> None:
    """RunError when a bundle has seen one of the patients. what: who is it, for the message (`fold 1 of repeat 0`)."""
    seen = sorted(set(patients) & trained_on(info))
    if seen:
        shown = ", ".join(seen[:8]) + (", ..." if len(seen) > 8 else "")
        raise RunError(
            f"Leak: {what} was trained on {shown}, and would now be applied to them as if it had never seen them. "
            "Delete the model's train.json and bundles/, and give the same command again."
        )


def check_external(patients: Iterable[str], info: Mapping[str, Any]) -> None:
    """RunError when one of the patients on whom a bundle is to be measured is among those that it was trained on."""
    seen = sorted(set(patients) & trained_on(info))
    if seen:
        shown = ", ".join(seen[:8]) + (f" and {len(seen) - 8} more" if len(seen) > 8 else "")
        raise RunError(
            f"Leak: the bundle was trained on {shown}. An external cohort has other patients; leave these out of the "
            "sheet, or look at the out-of-fold predictions of the run that made the bundle. If they are others because "
            "two hospitals number their patients alike, give them ids of their own in patient_id: a prefix, as in B-"
            f"{seen[0]}."
        )
