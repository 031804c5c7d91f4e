"""What the figures allow one to say, in plain language, and whether the label follows the site."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidemake.contamination import in_words
from slidemake.metrics import auroc
from slidemake.prediction_table import Predictions

REFERENCE = "mean_pool_lr"  # the baseline that every model must beat to be worth its parameters
SHUFFLED = "shuffled_label"
SITE_ONLY = "site_only"
CONTROLS = (REFERENCE, SITE_ONLY, SHUFFLED, "prevalence")
SMALL = 20  # patients of the rarer class below which one patient moves the AUROC by more than its rounding
GAP = 0.1  # pooled minus within-site AUROC worth a warning


def cramers_v(
    labels: np.ndarray, groups: list[str] | tuple[str, ...], seed: int, draws: int = 2000
) -> dict[str, float] | None:
    """Association of label and group: Cramér's V (0 none, 1 complete) and a permutation p-value (exact for any n).

    None with fewer than two groups or labels.
    """
    _, g = np.unique(np.array(groups), return_inverse=True)
    _, y = np.unique(labels, return_inverse=True)
    rows, columns = g.max(initial=0) + 1, y.max(initial=0) + 1
    if rows < 2 or columns < 2:
        return None
    n = len(y)
    expected = np.outer(np.bincount(g), np.bincount(y)) / n
    rng = np.random.default_rng(seed)

    def chi_square(of: np.ndarray) -> float:
        table = np.bincount(g * columns + of, minlength=rows * columns).reshape(rows, columns)
        return float(((table - expected) ** 2 / expected).sum())

    seen = chi_square(y)
    as_extreme = sum(chi_square(rng.permutation(y)) >= seen - 1e-9 for _ in range(draws))
    return {"cramers_v": float(np.sqrt(seen / (n * (min(rows, columns) - 1)))), "p": (as_extreme + 1) / (draws + 1)}


def _mean_auroc(p: Predictions, inside: np.ndarray) -> float | None:
    """AUROC among the patients `inside`, mean over repeats; None when a repeat has one class only."""
    values = [auroc(p.labels[inside] == 1, p.prob[r, inside, 1]) for r in range(len(p.repeats))]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def within_site_auroc(p: Predictions) -> dict[str, Any] | None:
    """AUROC inside sites, weighted by the sites' patients, mean over repeats, beside the pooled AUROC.

    Comparing only patients of one site removes what the site gives away: a gap means that part of the pooled figure
    comes from differences between sites. Two classes only; None when no site has both.
    """
    if len(p.classes) != 2:
        return None
    sites, found, patients = np.array(p.sites), [], 0
    for site in sorted(set(p.sites) - {""}):
        inside = sites == site
        value = _mean_auroc(p, inside)
        if value is not None:
            found.append((int(inside.sum()), value))
            patients += int(inside.sum())
    if not found:
        return None
    within = sum(n * value for n, value in found) / patients
    pooled = _mean_auroc(p, np.ones(len(p.patients), bool))
    return {"within": within, "pooled": within if pooled is None else pooled, "sites": len(found), "patients": patients}


def confounding(models: list[Predictions], entries: dict[str, Any], seed: int) -> dict[str, Any]:
    """Does the label follow the site, and do the models profit from it?"""
    first = models[0]
    named = np.array([bool(site) for site in first.sites])
    sites = [site for site in first.sites if site]
    association = cramers_v(first.labels[named], sites, seed) if sites else None
    table = {
        site: np.bincount(first.labels[[s == site for s in first.sites]], minlength=len(first.classes)).tolist()
        for site in sorted(set(sites))
    }
    within = {m.name: within_site_auroc(m) for m in models if m.name not in CONTROLS or m.name == REFERENCE}
    return {"sites": table, "association": association, "within_site": within}


def interval(m: dict[str, Any], value: str = "value") -> str:
    if m["low"] is None:
        return f"{m[value]:.2f}"
    return f"{m[value]:.2f} ({m['low']:.2f} to {m['high']:.2f})"


def say(level: str, code: str, text: str) -> dict[str, str]:
    return {"level": level, "code": code, "text": text}


def _about_size(result: dict[str, Any]) -> list[dict[str, str]]:
    counts = result["class_counts"]
    rarest = min(counts, key=lambda name: counts[name])
    n, events = result["patients"], counts[rarest]
    if events == 0:
        text = f"No patient is labelled {rarest}: nothing that compares classes can be computed."
        return [say("warning", "one_class", text)]
    if events >= SMALL:
        return []
    text = (
        f"Small sample: {n} patients, {events} of them {rarest}. One patient of this class ranked differently moves "
        f"the AUROC by up to {1 / events:.2f}; read the intervals, not the figures, and confirm on another cohort."
    )
    return [say("warning", "small_sample", text)]


def _against_controls(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Is this model better than the best of the controls that could have worked?"""
    scope = result["models"][name]["scopes"]["pooled"]["metrics"]["auroc"]
    if scope["value"] is None:
        return [say("warning", "undefined", f"{name}: no AUROC ({scope['reason']}).")]
    rivals = {
        c["reference"]: c["metrics"]["auroc"]
        for c in result["comparisons"]
        if c["model"] == name
        and c["reference"] != SHUFFLED
        and result["models"][c["reference"]]["control"]  # not another model of the task
        and c["metrics"]
        and c["metrics"]["auroc"]["low"] is not None
    }
    if not rivals:
        return [
            say("note", "no_comparison", f"{name}: AUROC {interval(scope)}; there is no control to compare it with.")
        ]
    best = min(rivals, key=lambda control: rivals[control]["difference"])
    control = result["models"][best]["scopes"]["pooled"]["metrics"]["auroc"]
    text = f"{name}: AUROC {interval(scope)}. The best control, {best}, reaches {interval(control)}; the difference is "
    text += interval(rivals[best], "difference")
    if scope["value"] == 1:
        note = (
            f"{name} ranks every patient correctly; resampling cannot show errors that this sample lacks, so the width "
        )
        perfect = [say("note", "perfect", note + "of its interval means nothing.")]
    else:
        perfect = []
    if rivals[best]["low"] > 0:
        text += ", which excludes 0: better than the controls in this cohort."
        return [say("good", "better_than_controls", text), *perfect]
    if rivals[best]["high"] < 0:
        return [say("warning", "worse_than_control", f"{text}: worse than the control."), *perfect]
    text += ", which includes 0: not shown to be better than the control."
    return [say("warning", "not_better", text), *perfect]


def _about_shuffled(result: dict[str, Any]) -> list[dict[str, str]]:
    if SHUFFLED not in result["models"]:
        return []
    m = result["models"][SHUFFLED]["scopes"]["pooled"]["metrics"]["auroc"]
    if m["low"] is None:
        return []
    text = f"The control trained on shuffled labels has AUROC {interval(m)}"
    if m["low"] <= 0.5 <= m["high"]:
        return [say("good", "shuffled_at_chance", f"{text}, which contains 0.5, as it must.")]
    if m["low"] > 0.5:
        text += ": above chance. Either labels leak between folds (look at the splits) or the shuffle was unlucky; "
        return [
            say("warning", "shuffled_above_chance", text + "train with another seed before believing any figure here.")
        ]
    text += ": below chance, which happens when few patients are shuffled; more repeats bring it to 0.5."
    return [say("note", "shuffled_below_chance", text)]


def _about_sites(result: dict[str, Any]) -> list[dict[str, str]]:
    said, known = [], result["confounding"]
    site = result["models"].get(SITE_ONLY, {}).get("scopes", {}).get("pooled", {}).get("metrics", {}).get("auroc")
    association = known["association"]
    predictive = bool(site and site["low"] is not None and site["low"] > 0.5)
    if predictive or (association and association["p"] < 0.05):
        text = "The label follows the site"
        if association:
            text += f" (Cramér's V {association['cramers_v']:.2f}, permutation p {association['p']:.2g})"
        if predictive:
            text += f"; the site alone predicts it with AUROC {interval(site)}"
        text += ". A model can score by recognising the laboratory: use leave-one-site-out splits."
        said.append(say("warning", "site_predicts_label", text))
    elif association:
        text = f"Label and site are not visibly associated (Cramér's V {association['cramers_v']:.2f}, "
        said.append(say("good", "site_balanced", text + f"permutation p {association['p']:.2g})."))
    for name, figures in known["within_site"].items():
        if figures and figures["pooled"] - figures["within"] > GAP:
            text = f"{name}: AUROC is {figures['pooled']:.2f} over all patients but {figures['within']:.2f} between "
            text += "patients of one site: part of it comes from differences between sites."
            said.append(say("warning", "between_sites", text))
    return said


def about_calibration(name: str, calibration: dict[str, Any]) -> list[dict[str, str]]:
    """What the calibration error of probabilities (of classes, grades, or one label) says."""
    measured, null = calibration["ece"], calibration["ece_if_calibrated"]
    if null is None:
        return []
    text = f"{name}: calibration error (ECE) {measured:.2f}; perfectly calibrated predictions would show "
    text += f"{null['mean']:.2f} on average and at most {null['p95']:.2f} in 95 % of samples of this size"
    if measured > null["p95"]:
        return [say("warning", "miscalibrated", f"{text}: do not read its probabilities as risks.")]
    return [say("note", "calibration", f"{text}: no evidence against calibration.")]


def about_groups(
    name: str, result: dict[str, Any], metric: str = "auroc", title: str = "AUROC"
) -> list[dict[str, str]]:
    """Columns whose groups differ in a metric by more than chance makes them."""
    said = []
    for column, found in result["models"][name]["subgroups"].items():
        gap = found["gaps"].get(metric)
        if gap is None or gap["gap_by_chance"] is None or gap["gap"]["value"] <= gap["gap_by_chance"]:
            continue
        text = (
            f"{name}: by {column}, {title} is {interval(gap['worst_value'])} for {gap['worst']} and "
            f"{interval(gap['best_value'])} for {gap['best']}, a gap of {interval(gap['gap'])}; groups of these "
            f"sizes differ by up to {gap['gap_by_chance']:.2f} by chance."
        )
        said.append(say("warning", "subgroup_gap", text))
    return said


def _about_coverage(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Sites where conformal sets hold the truth less often than promised."""
    sets = result["models"][name]["conformal"]
    if not sets or not sets["pooled"]:
        return []
    promise = 1 - sets["alpha"]
    short = [
        f"{site} ({interval(found['coverage'])})"
        for site, found in sets["sites"].items()
        if found["coverage"]["high"] is not None and found["coverage"]["high"] < promise
    ]
    if not short:
        return []
    text = f"{name}: sets that promise to hold the truth for {promise:.0%} of patients hold it less often at "
    return [say("warning", "coverage", f"{text}{', '.join(short)}: do not rely on its certainty there.")]


def verdict(result: dict[str, Any]) -> list[dict[str, str]]:
    """Findings as {level: good | note | warning, code, text}, most general first."""
    said = _about_size(result)
    for encoder, corpora in result["contamination"].items():
        text = in_words(encoder, corpora)
        said.append(say("warning", "contaminated", f"{text[0].upper()}{text[1:]}."))
    names = [name for name, entry in result["models"].items() if not entry["control"]]
    names = names or [name for name in result["models"] if name == REFERENCE]
    for name in names:
        said += _against_controls(name, result)
    said += _about_shuffled(result) + _about_sites(result)
    for name in names:
        said += about_calibration(name, result["models"][name]["calibration"])
        said += about_groups(name, result) + _about_coverage(name, result)
    if result["repeats"] > 1:
        text = (
            "Intervals say how the figures vary with other patients of the same kind; how they vary with other seeds "
        )
        said.append(say("note", "intervals", text + "is the spread over repeats."))
    return said
