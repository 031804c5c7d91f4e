"""New slides against the training slides of a model: has anything moved that the model's figures rest on?

For all new slides, for each site and for each month of scanning: the share of slides that failed, quality figures,
mean embeddings (MMD and Frechet distance in the principal directions of reference and new patients together, and how
many patients lie outside of what training saw), scores (PSI), and abstention (prediction sets that hold no or several
classes).

Every figure stands beside what chance gives: patients (slides, for quality) of reference and new are pooled and dealt
anew, and `expected` and `limit` are the median and the 95th percentile of the figure over those deals, `p` the share
of deals that reach it (a permutation test; Phipson and Smyth 2010). This matters most where numbers are small: PSI's
usual limits 0.1 and 0.25 are crossed by chance alone with some tens of patients. p values are Holm-corrected within a
group. A group of fewer than 5 patients is not judged.

Out-of-fold scores come from the models of one fold, new ones from the ensemble of all folds, which is a little less
extreme: a small PSI is expected. Drift is no error of the model, and none is no proof that it works: only labels tell.

MMD: Gretton et al. 2012 (unbiased, RBF kernel, bandwidth the median distance). Frechet: Dowson and Landau 1982.
PSI: sum (p - q) ln(p / q) over bins at the reference's deciles. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from slidemake.core.spacing import thinned
from slidemake.drift.reference import abstains
from slidemake.evaluation.comparisons import holm
from slidemake.statistics.bootstrap import scope_seed

SMALLEST = 5  # patients of a group
MOST = 500  # patients of a group that embeddings are compared for, evenly spaced
DIRECTIONS = 16  # principal directions in which they are compared
NEIGHBOURS = 5
DRAWS = 999
WATCH, ALARM = 0.05, 0.01  # corrected p values
# What counts as large, beside being no chance: a PSI of 0.25 and a KS distance of 0.3 are customary, a tenth of the
# slides or patients is a change that a laboratory would want to know of.
LARGE = {"failed": 0.1, "abstained": 0.1, "outside": 0.1, "psi": 0.25, "ks": 0.3}


@dataclass(frozen=True)
class Sample:
    """New slides as `drift` sees them: P patients, S slides."""

    patients: tuple[str, ...]
    sites: tuple[str, ...]  # (P,)
    months: tuple[str, ...]  # (P,) YYYY-MM, "" where the sheet has no date
    embeddings: np.ndarray  # (P, k) sketches of the patients' mean embeddings (`reference.sketched`)
    scores: dict[str, np.ndarray]  # (P,)
    prob: np.ndarray  # (P, C); C = 0 where the model does not classify
    slide_patients: tuple[str, ...]  # (S,) of every slide, failed ones too
    slide_groups: tuple[tuple[str, str], ...]  # (S,) site and month
    failed: np.ndarray  # (S,) bool
    quality: dict[str, np.ndarray]  # (S,) NaN where not known

    def group(self, kind: str, name: str) -> Sample:
        """The part of one site or one month."""
        own = self.sites if kind == "site" else self.months
        keep = np.array([value == name for value in own], bool)
        slides = np.array([pair[kind == "month"] == name for pair in self.slide_groups], bool)
        return replace(
            self,
            patients=chosen(self.patients, keep),
            sites=chosen(self.sites, keep),
            months=chosen(self.months, keep),
            embeddings=self.embeddings[keep],
            scores={name: values[keep] for name, values in self.scores.items()},
            prob=self.prob[keep],
            slide_patients=chosen(self.slide_patients, slides),
            slide_groups=chosen(self.slide_groups, slides),
            failed=self.failed[slides],
            quality={name: values[slides] for name, values in self.quality.items()},
        )


def chosen(values: Sequence[Any], where: np.ndarray) -> tuple[Any, ...]:
    """The values at which `where` (n,) is true."""
    return tuple(value for value, keep in zip(values, where, strict=True) if keep)


def mmd(kernel: np.ndarray, first: np.ndarray) -> float:
    """Unbiased MMD^2 of two samples: kernel (N, N) over both, first (N,) bool; at least two in each."""
    m, n = int(first.sum()), int((~first).sum())
    w = first.astype(float)
    within_first = w @ kernel @ w - (np.diag(kernel) * w).sum()
    v = 1 - w
    within_second = v @ kernel @ v - (np.diag(kernel) * v).sum()
    return float(within_first / (m * (m - 1)) + within_second / (n * (n - 1)) - 2 * (w @ kernel @ v) / (m * n))


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance^2 of the normals fitted to (m, k) and (n, k): |a - b|^2 + tr(A + B - 2 (AB)^1/2)."""
    a, b = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    values, vectors = np.linalg.eigh(a)
    half = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # (AB)^1/2 has the trace of (A^1/2 B A^1/2)^1/2, which is symmetric and so may be singular, too
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ b @ half), 0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * trace)


def psi(reference: np.ndarray, new: np.ndarray, bins: int = 10) -> float:
    """Population stability index over bins at the quantiles of `reference`.

    To every bin's share as much is added as half a case is in the smaller sample, so that no bin is empty.
    """
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1]))
    some = 0.5 / min(len(reference), len(new))
    share = []
    for values in (reference, new):
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        share.append((counts / len(values) + some) / (1 + some * len(counts)))
    p, q = share
    return float(((q - p) * np.log(q / p)).sum())


def outside(reference: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the 5th nearest reference patient, of reference patients (R,) but themselves and of new ones (P,)."""
    near = min(NEIGHBOURS, len(reference) - 1)
    own = np.sort(cdist(reference, reference), axis=1)[:, near]  # column 0 is the patient itself
    return own, np.sort(cdist(new, reference), axis=1)[:, near - 1]


def permutation(
    statistic: Callable[[np.ndarray], float], reference: int, new: int, seed: int | list[int], draws: int = DRAWS
) -> dict[str, Any]:
    """value, expected, limit and p of `statistic`, a function of (N,) bool that says which of the pooled are new."""
    member = np.r_[np.zeros(reference, bool), np.ones(new, bool)]
    value, rng = statistic(member), np.random.default_rng(seed)
    null = np.array([statistic(rng.permutation(member)) for _ in range(draws)])
    return {
        "value": value,
        "expected": float(np.median(null)),
        "limit": float(np.quantile(null, 0.95)),
        "p": float((1 + (null >= value - 1e-12).sum()) / (draws + 1)),
        "reference": reference,
        "new": new,
    }


def _rate(reference: np.ndarray, new: np.ndarray, seed: list[int]) -> dict[str, Any]:
    """Shares of two (n,) bool, compared by their difference in absolute terms."""
    pooled = np.r_[reference, new].astype(float)
    found = permutation(lambda m: abs(pooled[m].mean() - pooled[~m].mean()), len(reference), len(new), seed)
    return {**found, "share_reference": float(reference.mean()), "share_new": float(new.mean())}


def principal_coordinates(pooled: np.ndarray, most: int = DIRECTIONS) -> np.ndarray:
    """(N, K) -> (N, k): coordinates in at most `most` principal directions, the first with unit variance.

    One scale for all directions: small ones stay small. Fitted on both sides together, they favour neither, so that a
    permutation test in them is exact; fitted on the reference they would suit its own patients best.
    """
    centred = pooled - pooled.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    kept = min(most, max(1, len(pooled) - 1), int((singular > singular[0] * 1e-6).sum()) if singular[0] > 0 else 1)
    scale = singular[0] / np.sqrt(max(1, len(pooled) - 1))
    signs = np.sign(directions[np.arange(kept), np.abs(directions[:kept]).argmax(1)])
    return centred @ (directions[:kept] * signs[:, None] / (scale or 1.0)).T


def _embedding_measures(
    reference: np.ndarray, new: np.ndarray, sites: Sequence[str], seed: list[int]
) -> dict[str, Any]:
    pooled = principal_coordinates(np.r_[reference, np.array(thinned(list(new), MOST))])
    reference, new = pooled[: len(reference)], pooled[len(reference) :]
    distances = cdist(pooled, pooled, "sqeuclidean")
    width = np.median(distances[np.triu_indices(len(pooled), 1)]) or 1.0
    kernel = np.exp(-distances / width)
    measures = {"mmd": permutation(lambda member: mmd(kernel, member), len(reference), len(new), seed)}
    measures["mmd"]["between_training_sites"] = between_sites(reference, sites)
    measures["frechet"] = permutation(lambda m: frechet(pooled[~m], pooled[m]), len(reference), len(new), seed, 199)
    own, theirs = outside(reference, new)
    bound = np.quantile(own, 0.95)
    measures["outside"] = _rate(own > bound, theirs > bound, seed)
    return measures


def between_sites(embeddings: np.ndarray, sites: Sequence[str]) -> float | None:
    """The largest MMD^2 of a training site against the other ones: how far apart training data already were."""
    names = np.array(sites)
    distances = cdist(embeddings, embeddings, "sqeuclidean")
    kernel = (
        np.exp(-distances / (np.median(distances[np.triu_indices(len(names), 1)]) or 1.0)) if len(names) > 1 else None
    )
    found = [
        mmd(kernel, names == site)
        for site in sorted(set(sites) - {""})
        if min((names == site).sum(), (names != site).sum()) >= SMALLEST and kernel is not None
    ]
    return max(found) if found else None


def _measures(reference: Mapping[str, Any], sample: Sample, seed: list[int]) -> dict[str, Any]:
    """{measure: figures} of one group against the reference."""
    found: dict[str, Any] = {}
    failed = np.arange(reference["slides"]) < reference["failed"]
    if len(failed) and len(sample.failed):
        found["failed"] = _rate(failed, sample.failed, seed)
    for name, known in reference["quality"].items():
        values = sample.quality.get(name, np.array([]))
        values, known = values[np.isfinite(values)], np.array(known)
        pooled = np.r_[known, values]
        if min(len(values), len(known)) >= SMALLEST and np.ptp(pooled) > 0:  # no pen anywhere: nothing to compare
            test = permutation(kolmogorov_smirnov(pooled), len(known), len(values), seed)
            medians = {"median_reference": float(np.median(known)), "median_new": float(np.median(values))}
            found[f"quality {name}"] = {**test, **medians}
    embeddings = np.array(reference["embeddings"])
    if len(embeddings) >= SMALLEST:
        of_embeddings = _embedding_measures(embeddings, sample.embeddings, reference["sites"], seed)
        found |= {f"embedding {name}": figures for name, figures in of_embeddings.items()}
    for name, known in reference["scores"].items():
        values = sample.scores.get(name, np.array([]))
        if min(len(values), len(known)) >= SMALLEST:
            pooled = np.r_[np.array(known), values]
            found[f"score {name}"] = permutation(_psi(pooled), len(known), len(values), seed)
    if reference["conformal"] and reference["conformal"]["limit"] is not None and sample.prob.size:
        before = np.arange(reference["scored"]) < reference["abstained"]
        found["abstained"] = _rate(before, abstains(sample.prob, reference["conformal"]["limit"]), seed)
    return found


def kolmogorov_smirnov(pooled: np.ndarray) -> Callable[[np.ndarray], float]:
    """The Kolmogorov-Smirnov distance, with all that does not depend on the deal done once."""
    order = np.argsort(pooled, kind="stable")
    last = np.r_[np.diff(pooled[order]) > 0, True]  # of equal values

    def distance(member: np.ndarray) -> float:
        new = member[order]
        return float(np.abs(np.cumsum(new) / new.sum() - np.cumsum(~new) / (~new).sum())[last].max())

    return distance


def _psi(pooled: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda member: psi(pooled[~member], pooled[member])


def _level(name: str, figures: Mapping[str, Any]) -> str:
    """alarm: no chance, and large. watch: no chance. ok: what chance gives."""
    if figures["p_corrected"] >= WATCH:
        return "ok"
    if name == "embedding mmd":
        spread = figures["between_training_sites"]
        large = spread is None or figures["value"] > spread
    elif name == "embedding frechet":
        large = False  # says the same as mmd: shown, and left to it to raise the alarm
    else:
        kind = "psi" if name.startswith("score ") else "ks" if name.startswith("quality ") else name.split()[-1]
        large = figures["value"] >= LARGE[kind]
    return "alarm" if large and figures["p_corrected"] < ALARM else "watch"


def judge(reference: Mapping[str, Any], sample: Sample, seed: int = 0) -> dict[str, Any]:
    """Every group of the new slides against the reference: {"groups", "strangest", "conclusion", "points"}."""
    groups = [("all", "", sample)]
    for kind, names in (("site", sample.sites), ("month", sample.months)):
        listed = sorted(set(names) - {""})
        groups += [(kind, name, sample.group(kind, name)) for name in listed if kind == "month" or len(listed) > 1]
    judged = []
    for kind, name, part in groups:
        entry: dict[str, Any] = {"kind": kind, "name": name, "patients": len(part.patients), "slides": len(part.failed)}
        if len(part.patients) < SMALLEST:
            reason = f"{len(part.patients)} patients; a comparison needs at least {SMALLEST}"
            judged.append({**entry, "level": "not judged", "reason": reason, "measures": {}})
            continue
        measures = _measures(reference, part, scope_seed(seed, f"drift {kind} {name}"))
        for figures, p in zip(measures.values(), holm([m["p"] for m in measures.values()]), strict=True):
            figures["p_corrected"] = p
        for measure, figures in measures.items():
            figures["level"] = _level(measure, figures)
        levels = {figures["level"] for figures in measures.values()}
        level = next((level for level in ("alarm", "watch") if level in levels), "ok")
        judged.append({**entry, "level": level, "reason": None, "measures": measures})
    found = {"groups": judged, "strangest": strangest(reference, sample), "conclusion": conclusion(judged)}
    return found | {"points": _points(reference, sample)}


def strangest(reference: Mapping[str, Any], sample: Sample, most: int = 10) -> list[dict[str, Any]]:
    """The new patients furthest from training patients; `distance` 1 is the 95th percentile of training patients."""
    if len(reference["embeddings"]) < SMALLEST or not len(sample.patients):
        return []
    own, theirs = outside(np.array(reference["embeddings"]), sample.embeddings)
    relative = theirs / (np.quantile(own, 0.95) or 1.0)
    return [
        {"patient_id": sample.patients[i], "site": sample.sites[i], "distance": float(relative[i])}
        for i in np.argsort(-relative, kind="stable")[:most]
    ]


def _points(reference: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """At most 500 patients of each site in the first two principal directions of all, for the picture."""
    pooled = np.array([*reference["embeddings"], *sample.embeddings.tolist()])
    if not len(pooled):
        return {"reference": [], "new": {}}
    flat = principal_coordinates(pooled, 2)
    flat = np.c_[flat, np.zeros(len(flat))][:, :2].round(4)
    split = len(reference["embeddings"])
    sites = np.array(sample.sites)
    return {
        "reference": thinned(flat[:split].tolist(), MOST),
        "new": {site: thinned(flat[split:][sites == site].tolist(), MOST) for site in sorted(set(sample.sites))},
    }


_WORDS = {
    "failed": "more or fewer slides failed",
    "embedding mmd": "tissue looks different to the encoder",
    "embedding outside": "patients lie outside of what training saw",
    "abstained": "the share of undecided patients changed",
}


def _in_words(measure: str) -> str:
    kind, _, rest = measure.partition(" ")
    if kind == "quality":
        return f"{rest.replace('_', ' ')} changed"
    return "scores are distributed differently" if kind == "score" else _WORDS.get(measure, measure)


def conclusion(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What a reader should conclude: [{level, text}]."""
    lines = []
    for group in groups:
        who = "All new slides" if group["kind"] == "all" else f"{group['kind'].capitalize()} {group['name']}"
        differs = "differ" if group["kind"] == "all" else "differs"
        for level, how in (
            ("alarm", "clearly from the training slides"),
            ("watch", "somewhat from the training slides"),
        ):
            named = [
                _in_words(m) for m, f in group["measures"].items() if f["level"] == level and m != "embedding frechet"
            ]
            if named:
                lines.append({"level": level, "text": f"{who} {differs} {how}: {', '.join(dict.fromkeys(named))}."})
    if any(line["level"] == "alarm" for line in lines):
        advice = "Predictions there rest on data that training did not see: check them against labels before use."
        lines.append({"level": "alarm", "text": advice})
    whole = next((g for g in groups if g["kind"] == "all"), None)
    if whole is None or whole["level"] == "not judged":
        lines.append({"level": "watch", "text": "Too few new patients to say whether anything has changed."})
    elif not lines:
        lines.append({"level": "ok", "text": "Nothing measured here differs from the training slides beyond chance."})
    return lines
