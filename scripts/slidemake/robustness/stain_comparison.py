"""What stain normalisation does to a task: a linear probe of mean features with and without it, patients held out.

A sample of tiles of every slide goes through the encoder twice, normalised and as scanned; nothing else differs. It
says what normalisation does to what a linear model can read, not what it does to one aggregator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidemake.core.files import fingerprint, placed, read_json_if_whole, write_json
from slidemake.jobs import isolation
from slidemake.robustness.linear_probe import (
    FOLDS,
    held_out_scores,
    logistic_probe,
    macro_auroc,
    random_folds,
    reduce_vectors,
)
from slidemake.robustness.shortcuts import DRAWS
from slidemake.statistics.bootstrap import bootstrap_weights, percentile_interval

if TYPE_CHECKING:
    from slidemake.embedding.engine import SlideJob
    from slidemake.embedding.forward import Forward

TILES = 24  # of a slide
REPEATS = 5  # deals of the patients into folds, averaged


def slide_vectors(job: SlideJob, forward: Forward, count: int = TILES) -> dict[str, list[float]]:
    """Mean features {"with": (D,), "without": (D,)} of `count` tiles of a slide, evenly taken; {} without tiles."""
    from slidemake.embedding.engine import Source, read_selected, stain_hook

    with isolation.working_on(job.slide_id):
        source = Source(job)
        try:
            chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), count)).round().astype(int))
            if not len(source):
                return {}
            tiles = read_selected(source.store, source.slide, source.reader, chosen.tolist())
        finally:
            source.close()
        found = {}
        for name, hook in (("with", stain_hook(job.stain)), ("without", None)):
            parts = [forward(tiles[i : i + forward.batch], hook) for i in range(0, len(tiles), forward.batch)]
            found[name] = [float(f"{v:.6g}") for v in np.concatenate(parts).mean(axis=0, dtype=np.float64)]
        return found


def cohort_vectors(
    jobs: Sequence[SlideJob],
    make_forward: Callable[[], Forward],
    folder: Path,
    threads: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, np.ndarray]]:
    """{slide: `slide_vectors`} of the slides that have tiles; those computed before are read from `folder`."""
    from slidemake.embedding.forward import prepare_thread

    marks = [fingerprint("stain", comparison=job.slide_id, features=job.fingerprint, tiles=TILES) for job in jobs]
    known = [_vectors(folder / f"{mark}.json", job.slide_id) for mark, job in zip(marks, jobs, strict=True)]
    todo = [i for i, found in enumerate(known) if found is None]
    if todo:
        forward, done = make_forward(), len(jobs) - len(todo)
        with ThreadPoolExecutor(max(1, threads), initializer=prepare_thread, initargs=(forward.device,)) as pool:
            for i, found in zip(todo, pool.map(lambda i: slide_vectors(jobs[i], forward), todo), strict=True):
                path = folder / f"{marks[i]}.json"
                write_json(path, {"slide_id": jobs[i].slide_id, "vectors": found, **placed(path)})
                known[i] = found
                done += 1
                tell(done, len(jobs))
    return {
        job.slide_id: {name: np.asarray(vector) for name, vector in found.items()}
        for job, found in zip(jobs, known, strict=True)
        if found
    }


def _vectors(path: Path, slide_id: str) -> dict[str, list[float]] | None:
    """What was kept of a slide; None where there is nothing whole of it."""
    kept = read_json_if_whole(path)
    return kept.get("vectors") if kept is not None and kept.get("slide_id") == slide_id else None


def compare_stain(
    vectors: Mapping[str, Mapping[str, np.ndarray]],
    patient_of: Mapping[str, str],
    labels: Mapping[str, str],
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC of the probe with and without normalisation, the difference with a 95 % interval, and a `finding` in words.

    vectors: of `cohort_vectors`; labels: {patient: class}. Patients are held out in five folds, dealt five times and
    alike for both; the interval is a bootstrap of patients within classes, paired. One-versus-rest, averaged, for more
    than two classes. Without two patients of each of two classes all figures are None.
    """
    of_patient: dict[str, list[str]] = {}
    for slide in sorted(vectors):
        if patient_of[slide] in labels:
            of_patient.setdefault(patient_of[slide], []).append(slide)
    people = sorted(of_patient)
    names = sorted({labels[p] for p in people})
    y = np.array([names.index(labels[p]) for p in people], int)
    result: dict[str, Any] = {"patients": len(people), "tiles": TILES}
    if len(names) < 2 or np.bincount(y).min() < 2:
        empty = dict.fromkeys(("with", "without", "difference", "low", "high"))
        return {**result, **empty, "finding": _finding(None, None, None)}
    weights = np.concatenate([np.ones((1, len(y)), int), bootstrap_weights(y, DRAWS, [seed, 7])[0]])
    figures = {}
    for name in ("with", "without"):
        x = reduce_vectors(np.stack([np.mean([vectors[s][name] for s in of_patient[p]], axis=0) for p in people]))
        dealt = [random_folds(y, seed + repeat, FOLDS) for repeat in range(REPEATS)]
        scores = [held_out_scores(logistic_probe, x, y, fold, len(names)) for fold in dealt]
        figures[name] = np.mean([macro_auroc(y, score, weights) for score in scores], axis=0)
    gain = figures["with"] - figures["without"]
    low, high = percentile_interval(gain[1:])
    result |= {name: float(values[0]) for name, values in figures.items()}
    result |= {"difference": float(gain[0]), "low": low, "high": high}
    return {**result, "finding": _finding(result["difference"], low, high)}


def _finding(gain: float | None, low: float | None, high: float | None) -> dict[str, str]:
    """What a reader should conclude: {level, code, text}."""
    if gain is None or low is None or high is None or not np.isfinite(gain):
        text = "What stain normalisation does to a linear probe is not defined: too few patients with tiles in a class."
        return {"level": "note", "code": "stain_undefined", "text": text}
    figure = f"the AUROC of a linear probe by {gain:+.2f} ({low:+.2f} to {high:+.2f})"
    if high < 0:
        text = f"Stain normalisation makes it worse: it changes {figure}. Set stain.method: none."
        return {"level": "warning", "code": "stain_worse", "text": text}
    if low > 0:
        return {"level": "good", "code": "stain_better", "text": f"Stain normalisation helps: it changes {figure}."}
    text = f"Stain normalisation changes {figure}: no difference can be told on these patients."
    return {"level": "note", "code": "stain_same", "text": text}
