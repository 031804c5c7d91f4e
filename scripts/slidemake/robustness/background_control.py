"""Can the label be told from the background of the slides? It has to be at chance: there is no disease in glass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from slidemake.evaluation.verdict import NARROW
from slidemake.robustness.linear_probe import reduce_vectors
from slidemake.robustness.shortcut_words import P
from slidemake.robustness.shortcuts import NULLS, Slides, label_null


def background_control(
    vectors: Mapping[str, np.ndarray],
    labels: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    seed: int = 0,
    nulls: int = NULLS,
) -> dict[str, Any]:
    """AUROC of a linear model on the mean features of background, patients held out, beside permuted labels.

    vectors: {slide_id: (D,)} of the slides that have background; labels: {patient: class}; rows: of slides.csv. The
    alarm needs an interval above 0.5 and a permutation p of 0.05 or less. Returns what `shortcuts.label_null` does,
    with the numbers of slides with and without background, and the `finding` in words.
    """
    of_task = [row for row in rows if row["status"] == "ok" and row["patient_id"] in labels]
    kept = [row for row in of_task if row["slide_id"] in vectors]
    patients = tuple(row["patient_id"] for row in kept)
    result: dict[str, Any] = {"slides": len(kept), "without": len(of_task) - len(kept), "patients": len(set(patients))}
    if len(set(patients)) < 4 or len({labels[p] for p in patients}) < 2:
        nothing = {"auroc": None, "reason": "too few patients whose slides have background, or one class only"}
        return {**result, **nothing, "finding": judged(nothing)}
    known = tuple(labels[p] for p in patients)
    none = ("",) * len(kept)
    slides = Slides(np.stack([vectors[row["slide_id"]] for row in kept]), patients, known, none, none)
    result |= label_null(reduce_vectors(slides.vectors), slides, seed, nulls)
    return {**result, "finding": judged(result)}


def judged(found: Mapping[str, Any]) -> dict[str, str]:
    """What a reader should conclude: {level, code, text}."""
    if found["auroc"] is None:
        text = f"Whether the label can be told from the background alone is not defined: {found['reason']}."
        return {"level": "note", "code": "background_undefined", "text": text}
    text = f"From tiles without tissue alone, the label is told with AUROC {found['auroc']:.2f}"
    if found["low"] is not None:
        text += f" ({found['low']:.2f} to {found['high']:.2f})"
    if found["low"] is not None and found["low"] > 0.5 and found["p"] <= P:
        text += (
            ": the slides of the classes differ in how they were made or scanned (glass, pen, scanner, compression), "
            "and a model can score by that. Believe figures under folds that keep sites whole, or on another cohort."
        )
        return {"level": "warning", "code": "background", "text": text}
    if found["low"] is not None and found["low"] <= 0.5 <= found["high"] <= found["low"] + NARROW:
        return {"level": "good", "code": "background_blind", "text": f"{text}, which contains 0.5, as it must."}
    text += ": not shown to be more than chance, which is not to say that there is nothing in the glass."
    return {"level": "note", "code": "background_not_shown", "text": text}
