"""What the figures allow one to say, in plain language, and whether the label follows the site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slidemake.core.words import contamination_warning
from slidemake.statistics.association import association_test
from slidemake.statistics.class_metrics import auroc
from slidemake.tasks.controls import CHANCE, CONTROLS, INSTANCE_LINEAR, REFERENCE, SHUFFLED, SITE_ONLY
from slidemake.tasks.prediction_table import Predictions

SITES_KEPT = ("leave_one_site_out", "site_preserved")  # splits in which a tested site was never trained on
ASSESSED = 50  # patients below which a test of calibration finds next to nothing
NARROW = 0.2  # an interval that is wider says too little to call a control right
SMALL = 20  # patients of the rarer class below which one patient moves the AUROC by more than its rounding
GAP = 0.1  # pooled minus within-site AUROC worth a warning


def _mean_auroc(p: Predictions, inside: np.ndarray) -> float | None:
    """AUROC among the patients `inside`, mean over repeats; None when a repeat has one class only."""
    values = [auroc(p.labels[inside] == 1, p.ranks[r, inside, 1]) for r in range(len(p.repeats))]
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
    association = association_test(first.labels[named], sites, seed) if sites else None
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


def against_controls(
    name: str,
    title: str,
    figure: dict[str, Any],
    rivals: dict[str, Any],
    figure_of: Callable[[str], dict[str, Any]],
    but_linear: bool = False,
) -> list[dict[str, str]]:
    """Is this model better than the best of the controls that could have worked?

    figure: the model's {value, low, high}; rivals: {control: the difference from it {difference, low, high, p_holm}};
    figure_of: the figure of a control. A model that was compared with nothing but a null model is above chance at best.
    but_linear: the control `instance_linear`, which it is not shown to be better than, was left out of the rivals.
    """
    if not rivals:
        text = f"{name}: {title} {interval(figure)}; there is no control to compare it with."
        return [say("note", "no_comparison", text)]
    best = min(rivals, key=lambda control: rivals[control]["difference"])
    found, alone = rivals[best], set(rivals) <= set(CHANCE)
    if best == INSTANCE_LINEAR and len(rivals) > 1 and found["low"] <= 0 <= found["high"]:
        others = {control: rival for control, rival in rivals.items() if control != INSTANCE_LINEAR}
        text = f"{name} is not shown to be better than linear scores per tile: the control {best} reaches {title} "
        text += f"{interval(figure_of(best))}, the difference is {interval(found, 'difference')}."
        said = against_controls(name, title, figure, others, figure_of, but_linear=True)
        return [*said, say("note", "as_good_as_linear", text)]
    if alone:
        rival = "By chance" if but_linear else "The only comparison is with chance:"
        rival += f" {best} has"
    else:
        rival = f"{'Of the other controls the best' if but_linear else 'The best control'}, {best}, reaches"
    text = f"{name}: {title} {interval(figure)}. {rival} {interval(figure_of(best))}; the difference is "
    text += interval(found, "difference")
    if found["low"] <= 0 <= found["high"]:
        end = "above chance" if alone else "better than the control"
        return [say("warning", "not_better", f"{text}, which includes 0: not shown to be {end}.")]
    if found["high"] < 0:
        end = "below chance: are the labels inverted?" if alone else "worse than the control."
        return [say("warning", "worse_than_control", f"{text}: {end}")]
    if alone:
        text += ", which excludes 0: above chance."
        text += "" if but_linear else " Whether a simpler model would do as well was not tested here."
        return [say("note", "above_chance", text)]
    p = max((c["p_holm"] for c in rivals.values() if c["p_holm"] is not None), default=0.0)
    if p >= 0.05:
        text += f", but p is {p:.2g} once corrected for all comparisons of the task: not shown to be better."
        return [say("warning", "not_better", text)]
    which = "the other controls" if but_linear else "the controls"
    return [say("good", "better_than_controls", f"{text}, which excludes 0: better than {which} in this cohort.")]


def rivals_of(name: str, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """{control: comparison in a metric} of a model with the controls that could have worked."""
    return {
        c["reference"]: {**c["metrics"][metric], "p_holm": c.get("p_holm")}
        for c in result["comparisons"]
        if c["model"] == name
        and c["reference"] != SHUFFLED
        and result["models"][c["reference"]]["control"]  # not another model of the task
        and (c["metrics"] or {}).get(metric, {}).get("low") is not None
    }


def pooled(result: dict[str, Any], name: str, metric: str) -> dict[str, Any] | None:
    """The figure of a model over all patients; None where it was not trained or has no such metric."""
    entry = result["models"].get(name)
    return entry["scopes"]["pooled"]["metrics"].get(metric) if entry else None


def beats_controls(name: str, result: dict[str, Any], metric: str, title: str) -> list[dict[str, str]]:
    """`against_controls` of a model of the task in a metric."""
    found = pooled(result, name, metric)
    if found is None or found["value"] is None:
        return [say("warning", "undefined", f"{name}: no {title} ({found['reason'] if found else 'missing'}).")]

    def figure_of(control: str) -> dict[str, Any]:
        figure = pooled(result, control, metric)
        assert figure is not None
        return figure

    return against_controls(name, title, found, rivals_of(name, result, metric), figure_of)


def about_shuffled(result: dict[str, Any], metric: str, title: str, chance: float) -> list[dict[str, str]]:
    m = pooled(result, SHUFFLED, metric)
    return [] if m is None or m["low"] is None else shuffled_control(title, m, chance)


def about_intervals(result: dict[str, Any]) -> list[dict[str, str]]:
    if result["repeats"] == 1:
        return []
    text = "Intervals say how the figures vary with other patients of the same kind; how they vary with other seeds "
    return [say("note", "intervals", text + "is the spread over repeats.")]


def _about_auroc(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    said = beats_controls(name, result, "auroc", "AUROC")
    if (
        result["models"][name]["scopes"]["pooled"]["metrics"]["auroc"]["value"] == 1
        and said[0]["code"] != "no_comparison"
    ):
        text = f"{name} ranks every patient correctly; resampling cannot show errors that this sample lacks, so the "
        said.append(say("note", "perfect", text + "width of its interval means nothing."))
    return said


def shuffled_control(title: str, figure: dict[str, Any], chance: float) -> list[dict[str, str]]:
    """Is the control trained on shuffled labels at chance, as it must be, and is that known well enough to say so?"""
    text = f"The control trained on shuffled labels has {title} {interval(figure)}"
    if figure["low"] <= chance <= figure["high"]:
        if figure["high"] - figure["low"] <= NARROW:
            return [say("good", "shuffled_at_chance", f"{text}, which contains {chance:g}, as it must.")]
        text += f": no sign of a leak, but so wide an interval would contain {chance:g} with a small one, too."
        return [say("note", "shuffled_at_chance", text)]
    if figure["low"] > chance:
        text += ": above chance. Either labels leak between folds (look at the splits) or the shuffle was unlucky; "
        text += "train with another seed before believing any figure here."
        return [say("warning", "shuffled_above_chance", text)]
    text += f": below chance, which happens when few patients are shuffled; more repeats bring it to {chance:g}."
    return [say("note", "shuffled_below_chance", text)]


def about_sites_split(method: str | None) -> tuple[str, str]:
    """Level and advice where the label follows the site, by how the patients were split (None: not at all)."""
    if method in SITES_KEPT:
        return "note", "No site is trained and tested on here, so no figure profits from recognising the laboratory."
    if method is None:
        return (
            "warning",
            "Nothing was trained here, but figures over all patients mix sites: look at each site by itself.",
        )
    return "warning", "A model can score by recognising the laboratory: use leave-one-site-out splits."


def _about_sites(result: dict[str, Any]) -> list[dict[str, str]]:
    said, known = [], result["confounding"]
    site = pooled(result, SITE_ONLY, "auroc")
    association = known["association"]
    predictive = bool(site and site["low"] is not None and site["low"] > 0.5)
    if predictive or (association and association["p"] < 0.05):
        text = "The label follows the site"
        if association:
            text += f" (Cramér's V {association['cramers_v']:.2f}, permutation p {association['p']:.2g})"
        if site and predictive:
            text += f"; the site alone predicts it with AUROC {interval(site)}"
        level, advice = about_sites_split(result.get("split"))
        said.append(say(level, "site_predicts_label", f"{text}. {advice}"))
    elif association:
        text = f"Label and site are not shown to be associated (Cramér's V {association['cramers_v']:.2f}, "
        said.append(say("note", "site_balanced", text + f"permutation p {association['p']:.2g})."))
    for name, figures in known["within_site"].items():
        if figures and figures["pooled"] - figures["within"] > GAP:
            text = f"{name}: AUROC is {figures['pooled']:.2f} over all patients but {figures['within']:.2f} between "
            text += "patients of one site: part of it comes from differences between sites."
            said.append(say("warning", "between_sites", text))
    return said


def about_calibration(name: str, calibration: dict[str, Any]) -> list[dict[str, str]]:
    """What the calibration error of probabilities (of classes, grades, or one label) says."""
    measured, null, n = calibration["ece"], calibration["ece_if_calibrated"], calibration["n"]
    if null is None:
        return []
    text = f"{name}: calibration error (ECE) {measured:.2f}; perfectly calibrated predictions would show "
    text += f"{null['mean']:.2f} on average and at most {null['p95']:.2f} in 95 % of samples of this size"
    if measured > null["p95"]:
        return [say("warning", "miscalibrated", f"{text}: do not read its probabilities as risks.")]
    if n < ASSESSED:
        return [say("note", "calibration", f"{text}: with {n} patients calibration cannot be assessed.")]
    return [say("note", "calibration", f"{text}: no evidence against calibration.")]


def about_groups(
    name: str, result: dict[str, Any], metric: str = "auroc", title: str = "AUROC"
) -> list[dict[str, str]]:
    """Columns whose groups differ in a metric by more than chance makes them, and groups too small to be judged."""
    said = []
    for column, found in result["models"][name]["subgroups"].items():
        small = {group: entry["n"] for group, entry in found["groups"].items() if entry["reason"]}
        if small:
            listed = ", ".join(f"{group} ({n})" for group, n in list(small.items())[:8])
            more = f" and {len(small) - 8} more" if len(small) > 8 else ""
            text = (
                f"{name}: how it does by {column} is not known for {listed}{more}: too few patients (in brackets) or "
            )
            said.append(say("note", "subgroup_unknown", f"{text}too few of a class to get figures."))
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
        text = contamination_warning(encoder, corpora)
        said.append(say("warning", "contaminated", f"{text[0].upper()}{text[1:]}."))
    names = [name for name, entry in result["models"].items() if not entry["control"]]
    names = names or [name for name in result["models"] if name == REFERENCE]
    for name in names:
        said += _about_auroc(name, result)
    said += about_shuffled(result, "auroc", "AUROC", 0.5) + _about_sites(result)
    for name in names:
        said += about_calibration(name, result["models"][name]["calibration"])
        said += about_groups(name, result) + _about_coverage(name, result)
    return said + about_intervals(result)
