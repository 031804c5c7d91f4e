"""Stress tests: what becomes of a model's figures when tiles are compressed, blurred, dimmed, restained or rescaled.

A sample of the tiles of every tested patient is embedded again under each corruption and severity, and predicted by the
model of the fold that never saw the patient (first repeat). Severity 0 is the same sample as it is, so that differences
are those of the corruption and not of the sample. Nothing is trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.files import fingerprint, read_json_if_whole, write_json
from slidemake.embedding.engine import SlideJob, Source, read_selected, stain_hook
from slidemake.embedding.forward import Forward, prepare_thread
from slidemake.evaluation.probabilities.calibration import bins_for
from slidemake.jobs import isolation
from slidemake.mil.bundle import Bundle, predict
from slidemake.robustness.corruptions import SEVERITIES, corrupt
from slidemake.statistics.bootstrap import bootstrap_weights, percentile_interval, scope_seed
from slidemake.statistics.class_metrics import metrics_over
from slidemake.statistics.ordinal_metrics import metrics_over as ordinal_metrics
from slidemake.tasks.base import NO_SKILL, SCORES, Outcome
from slidemake.tasks.classes import decide
from slidemake.tasks.ordinal import OrdinalOutcome

METRICS = ("auroc", "auprc", "balanced_accuracy", "brier")
DIFFERENCE = ("difference", "difference_low", "difference_high")
COLUMNS = ("corruption", "severity", "amount", "metric", "value", "low", "high", *DIFFERENCE, "patients", "reason")


@dataclass(frozen=True)
class Patient:
    """A tested patient: truth as the outcome encodes it, the model of its fold, and its slides.

    domains: {slide_id: scanner or site} where the model harmonises features by it (`Bundle.domain`).
    """

    patient_id: str
    label: Any
    bundle: Bundle
    slides: tuple[SlideJob, ...]
    domains: Mapping[str, str] = field(default_factory=dict)


def levels(kinds: Sequence[str]) -> list[tuple[str, int]]:
    """(corruption, severity) of everything that is computed; ("none", 0) first."""
    return [("none", 0), *((kind, severity) for kind in kinds for severity in (1, 2, 3))]


def sample_tiles(patient: Patient, count: int, seed: int) -> list[tuple[SlideJob, np.ndarray]]:
    """Which tiles of which slide: `count` drawn evenly from all of a patient's tiles, sorted."""
    sources = [Source(job) for job in patient.slides]
    sizes = [len(source) for source in sources]
    for source in sources:
        source.close()
    rng = np.random.default_rng([seed, zlib.crc32(patient.patient_id.encode())])
    chosen = np.sort(rng.permutation(sum(sizes))[:count])
    starts = np.cumsum([0, *sizes])
    parts = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(starts)]
    return [(job, part) for job, part in zip(patient.slides, parts, strict=True) if len(part)]


def stress_patient(
    patient: Patient, forward: Forward, kinds: Sequence[str], count: int, seed: int
) -> dict[str, list[float]]:
    """{"<corruption> <severity>": values (P,)} of one patient, as its outcome defines them; empty without tiles."""
    features: dict[str, list[np.ndarray]] = {}
    sizes, domains = [], []
    for job, indices in sample_tiles(patient, count, seed):
        with isolation.working_on(job.slide_id):
            source = Source(job)
            try:
                tiles = read_selected(source.store, source.slide, source.reader, indices.tolist())
                mpp = float(source.store.attrs["mpp"]["requested"])
            finally:
                source.close()
            sizes.append(len(tiles))
            domains.append(patient.domains.get(job.slide_id, ""))
            hook = stain_hook(job.stain)
            for kind, severity in levels(kinds):
                changed = corrupt(tiles, kind, severity, mpp)
                starts = range(0, len(changed), forward.batch)
                with isolation.unhurried():
                    parts = [forward(changed[i : i + forward.batch], hook) for i in starts]
                features.setdefault(f"{kind} {severity}", []).extend(parts)
    bags = {key: np.concatenate(parts) for key, parts in features.items()}
    found = {key: predict(patient.bundle, bag, sizes, domains) for key, bag in bags.items()}
    return {key: prediction.values.tolist() for key, prediction in found.items()}


def stress_cohort(
    patients: Sequence[Patient],
    make_forward: Callable[[], Forward],
    options: Mapping[str, Any],
    identity: Mapping[str, Any],
    folder: Path,
    threads: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, list[float]]]:
    """`stress_patient` of every patient, in their order; those computed before are read from `folder`.

    identity: the encoder's; make_forward: called only when somebody is to be computed; tell(done, total): after each.
    """
    marks = [
        fingerprint(
            "stress",
            bundle=patient.bundle.info["fingerprint"],
            encoder=identity,
            slides=[[job.slide_id, job.fingerprint, patient.domains.get(job.slide_id)] for job in patient.slides],
            options=dict(options),
        )
        for patient in patients
    ]
    known = [(read_json_if_whole(folder / f"{mark}.json") or {}).get("values") for mark in marks]
    todo = [i for i, found in enumerate(known) if found is None]
    if todo:
        forward = make_forward()
        done = len(known) - len(todo)
        with ThreadPoolExecutor(max(1, threads), initializer=prepare_thread, initargs=(forward.device,)) as pool:
            kinds, count, seed = options["corruptions"], options["tiles"], options["seed"]
            work = pool.map(lambda i: stress_patient(patients[i], forward, kinds, count, seed), todo)
            for i, found in zip(todo, work, strict=True):
                write_json(folder / f"{marks[i]}.json", {"patient_id": patients[i].patient_id, "values": found})
                known[i] = found
                done += 1
                tell(done, len(known))
    for old in set(folder.glob("*.json")) - {folder / f"{mark}.json" for mark in marks}:
        old.unlink(missing_ok=True)  # of models or settings that are no longer
    return [found or {} for found in known]


def judge(
    patients: Sequence[Patient],
    found: Sequence[Mapping[str, list[float]]],
    kinds: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics at every severity, and their paired difference from severity 0, with intervals over patients.

    options: bootstrap, seed, level, stratify, ece_bins of the evaluation. Classes have the metrics `METRICS`,
    `agreement` (share of patients with the same decision as at severity 0) and `moved` (mean absolute change of the
    probability of the true class); other tasks the one score that training watches.
    """
    tested = [i for i, values in enumerate(found) if values]
    if not tested:
        return {"headline": None, "patients": 0, "points": [], "conclusion": []}
    outcome = patients[tested[0]].bundle.outcome
    measure = _ClassMeasures if outcome.by_class else _ScoreMeasures  # grades have an order
    measures = measure([patients[i] for i in tested], options)
    points: list[dict[str, Any]] = []
    for kind, severity in levels(kinds):
        values = np.array([found[i][f"{kind} {severity}"] for i in tested])
        amount = SEVERITIES[kind][1][severity - 1] if severity else None
        points.append({"corruption": kind, "severity": severity, "amount": amount, **measures.at(values)})
    headline = measures.names[0]
    return {
        "headline": headline,
        "patients": len(tested),
        "points": points,
        "conclusion": conclusion(points, headline),
    }


class _Measures:
    """Figures of the same patients under one corruption after the other; the first one is what others differ from."""

    names: tuple[str, ...] = ()

    def __init__(self, patients: Sequence[Patient], options: Mapping[str, Any]):
        self.patients, self.options = patients, options
        self.clean: Any = None
        self.seed = scope_seed(options["seed"], "stress")

    def _figures(self, name: str, now: tuple[float, np.ndarray], clean: tuple[float, np.ndarray]) -> dict[str, Any]:
        if not (np.isfinite(now[0]) and np.isfinite(clean[0])):
            reason = "not defined for these patients"
            return {"value": None, "low": None, "high": None, "difference": None, "reason": reason}
        low, high = percentile_interval(now[1], self.options["level"])
        below, above = percentile_interval(now[1] - clean[1], self.options["level"])
        difference = {"value": now[0] - clean[0], "low": below, "high": above}
        return {"value": now[0], "low": low, "high": high, "difference": difference, "reason": None}


class _ClassMeasures(_Measures):
    names = METRICS

    def __init__(self, patients: Sequence[Patient], options: Mapping[str, Any]):
        super().__init__(patients, options)
        self.labels = np.array([patient.label for patient in patients], int)
        self.weights = bootstrap_weights(self.labels, options["bootstrap"], self.seed, options["stratify"])[0]

    def at(self, prob: np.ndarray) -> dict[str, Any]:
        """prob (n, C) -> metrics, agreement, moved."""
        decided = np.array([self._decision(*pair) for pair in zip(self.patients, prob, strict=True)])
        truth = prob[np.arange(len(self.labels)), self.labels]
        bins = bins_for(len(self.labels), self.options["ece_bins"])
        values = metrics_over(self.labels, prob, decided, bins)
        draws = metrics_over(self.labels, prob, decided, bins, self.weights)
        now = {name: (float(values[name][0]), draws[name]) for name in METRICS}
        if self.clean is None:
            self.clean = (now, decided, truth)
        before, then, sure = self.clean
        return {
            "metrics": {name: self._figures(name, now[name], before[name]) for name in METRICS},
            "agreement": float((decided == then).mean()),
            "moved": float(np.abs(truth - sure).mean()),
        }

    @staticmethod
    def _decision(patient: Patient, prob: np.ndarray) -> int:
        classes, threshold = patient.bundle.classes, patient.bundle.threshold
        return classes.index(decide(prob, classes, None if isinstance(threshold, list) else threshold))


def value_score(outcome: Outcome, values: np.ndarray, labels: Sequence[Any]) -> float | None:
    """The score that training watches, of predicted values (n, P): they come from models of several folds, and their
    raw outputs have scales of their own."""
    if isinstance(outcome, OrdinalOutcome):
        grades = len(outcome.classes)
        found = float(ordinal_metrics(np.asarray(labels, int), values @ np.arange(grades), None, grades)["c_index"][0])
        return found if np.isfinite(found) else None
    return outcome.score_of(values, labels)


class _ScoreMeasures(_Measures):
    """Tasks without classes, or with ordered ones: the outcome's own score of the predicted values."""

    def __init__(self, patients: Sequence[Patient], options: Mapping[str, Any]):
        super().__init__(patients, options)
        self.outcome = patients[0].bundle.outcome
        self.names = (self.outcome.score,)
        rng = np.random.default_rng(self.seed)
        self.draws = rng.integers(0, len(patients), (options["bootstrap"], len(patients)))

    def at(self, values: np.ndarray) -> dict[str, Any]:
        """values (n, P) -> the score."""
        labels = [patient.label for patient in self.patients]

        def score(rows: Sequence[int]) -> float:
            found = value_score(self.outcome, values[rows], [labels[i] for i in rows])
            return np.nan if found is None else float(found)

        now = (score(list(range(len(labels)))), np.array([score(rows.tolist()) for rows in self.draws]))
        if self.clean is None:
            self.clean = now
        return {"metrics": {self.names[0]: self._figures(self.names[0], now, self.clean)}}


def conclusion(points: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, str]]:
    """What a reader should conclude: [{level, text}], one line per corruption that lowers the metric."""
    name = SCORES[metric]
    clean = points[0]["metrics"][metric] if points else None
    chance = NO_SKILL[metric]
    if clean and (clean["value"] is None or clean["low"] <= chance):
        text = f"On this sample of tiles {name} is not above chance even without corruption: nothing can be lost."
        return [{"level": "warning", "text": text}]
    lines: list[dict[str, str]] = []
    for point in points:
        change = point["metrics"][metric]["difference"]
        if not point["severity"] or not change or change["high"] >= 0 or change["value"] > -0.02:
            continue
        if any(line["corruption"] == point["corruption"] for line in lines):
            continue  # the mildest severity that costs something says it
        unit, _ = SEVERITIES[point["corruption"]]
        text = (
            f"{point['corruption'].capitalize()} costs {name} from severity {point['severity']} on "
            f"({unit}: {point['amount']:g}): {change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})."
        )
        lines.append({"level": "warning", "corruption": point["corruption"], "text": text})
    if not lines and points:
        text = f"No corruption, at any severity tried, lowers {name} by 0.02 or more beyond chance."
        return [{"level": "ok", "text": text}]
    return [{"level": line["level"], "text": line["text"]} for line in lines]


def table_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of stress.csv."""
    rows = []
    for point in result["points"]:
        first = {"corruption": point["corruption"], "severity": point["severity"], "patients": result["patients"]}
        first["amount"] = "" if point["amount"] is None else f"{point['amount']:g}"
        for metric, f in point["metrics"].items():
            row = {**first, "metric": metric, "reason": f["reason"] or ""}
            row |= {key: "" if f[key] is None else f"{f[key]:.6g}" for key in ("value", "low", "high")}
            for key, name in (("value", "difference"), ("low", "difference_low"), ("high", "difference_high")):
                row[name] = f"{f['difference'][key]:.6g}" if f["difference"] else ""
            rows.append(row)
        beside = [name for name in ("agreement", "moved") if name in point]
        rows += [{**first, "metric": name, "value": f"{point[name]:.6g}", "reason": ""} for name in beside]
    return rows
