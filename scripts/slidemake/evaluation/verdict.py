"""What the figures allow one to say, in plain language, about tasks of all types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slidemake.core.words import contamination_warning
from slidemake.evaluation.result import interval, pooled, rivals_of, say
from slidemake.evaluation.survival_words import about_survival
from slidemake.tasks.base import Outcome
from slidemake.tasks.controls import CHANCE, INSTANCE_LINEAR, REFERENCE, SHUFFLED, SITE_ONLY

SITES_KEPT = ("leave_one_site_out", "site_preserved")  # splits in which a tested site was never trained on
ASSESSED = 50  # patients below which a test of calibration finds next to nothing
NARROW = 0.2  # an interval that is wider says too little to call a control right
GAP = 0.1  # pooled minus within-site AUROC worth a warning


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


def about_intervals(result: dict[str, Any], names: Sequence[str], title: str) -> list[dict[str, str]]:
    """Which question each interval answers."""
    known = {name: found for name in names if (found := result["models"][name].get("procedure"))}
    text = "Intervals say how these models, as they were trained, would do on other patients of the same kind."
    if known:
        shown = ", ".join(f"{name} {f['auroc']['low']:.2f} to {f['auroc']['high']:.2f}" for name, f in known.items())
        text += f" Other patients would train other models, too. That counted, {title} is known to lie in: {shown}; "
        text += f"differences in {title} between models, their intervals and p count it."
    elif result["repeats"] > 1:
        text += " How figures vary with other seeds is the spread over repeats."
    else:
        return []
    return [say("note", "intervals", text)]


def _about_model(name: str, result: dict[str, Any], outcome: Outcome) -> list[dict[str, str]]:
    title = outcome.title(outcome.primary)
    said = beats_controls(name, result, outcome.primary, title)
    found = pooled(result, name, outcome.primary)
    if found is None or found["value"] is None or not outcome.tests_auroc:
        return said
    high = found["high"]
    if procedure := result["models"][name].get("procedure"):
        high = procedure["auroc"]["high"]
    if high is not None and high < result["chance"]:
        text = f"{name}: {title} {interval(found)} is below {result['chance']:g} beyond chance. A model that knows "
        text += "nothing is at chance: look whether labels are inverted in a part of the cohort, or follow the folds."
        said.append(say("warning", "below_chance", text))
    if found["value"] == 1 and said[0]["code"] != "no_comparison":
        text = (
            f"{name} ranks every patient rightly; of the other figures resampling cannot show errors that this sample "
        )
        said.append(say("note", "perfect", text + "lacks, so that the width of their intervals means little."))
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


def _about_sites(result: dict[str, Any], outcome: Outcome) -> list[dict[str, str]]:
    said, known = [], result["confounding"]
    site, association = pooled(result, SITE_ONLY, result["check"]), known["association"]
    predictive = bool(site and site["low"] is not None and site["low"] > result["chance"])
    label = "The label" if not association or "label" not in association else f"The label {association['label']}"
    if association:
        measured = f"Cramér's V {association['cramers_v']:.2f}, permutation p {association['p']:.2g}"
    if predictive or (association and association["p"] < 0.05):
        text = "The label follows the site"
        if association:
            text = f"{label} follows the site ({measured})"
        if site and predictive:
            text += f"; the site alone predicts it with {outcome.title(result['check'])} {interval(site)}"
        level, advice = about_sites_split(result.get("split"))
        said.append(say(level, "site_predicts_label", f"{text}. {advice}"))
    elif association:
        text = f"Label and site are not shown to be associated ({measured})."
        said.append(say("note", "site_balanced", text))
    for name, figures in known["within_site"].items():
        if figures and figures["pooled"] - figures["within"] > GAP:
            text = f"{name}: {outcome.title(outcome.primary)} is {figures['pooled']:.2f} over all patients but "
            text += f"{figures['within']:.2f} between patients of one site: part of it comes from differences between "
            said.append(say("warning", "between_sites", f"{text}sites."))
    return said


def about_calibration(name: str, calibration: dict[str, Any]) -> list[dict[str, str]]:
    """What the calibration error of probabilities (of classes, grades, or one label) says."""
    of = calibration.get("single") or calibration  # of what the AUROC is of
    measured, null, n = of["ece"], of["ece_if_calibrated"], of["n"]
    if null is None:
        return []
    repeats = " as a mean over repeats" if calibration.get("single") else ""
    text = f"{name}: calibration error (ECE) {measured:.2f}{repeats}; perfectly calibrated predictions would show "
    text += f"{null['mean']:.2f} on average and at most {null['p95']:.2f} in 95 % of samples of this size"
    if measured > null["p95"]:
        return [say("warning", "miscalibrated", f"{text}: do not read its probabilities as risks.")]
    if n < ASSESSED:
        return [say("note", "calibration", f"{text}: with {n} patients calibration cannot be assessed.")]
    return [say("note", "calibration", f"{text}: no evidence against calibration.")]


def about_groups(name: str, result: dict[str, Any], outcome: Outcome) -> list[dict[str, str]]:
    """Columns whose groups differ in the primary metric by more than chance makes them, and groups too small to be
    judged."""
    said, metric, title = [], outcome.primary, outcome.title(outcome.primary)
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
    sets = result["models"][name].get("conformal")
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


def _of_classes(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    return about_calibration(name, result["models"][name]["calibration"])


def _of_labels(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Several labels: those whose probabilities are off, or that none is shown to be."""
    labels = result["models"][name]["labels"].items()
    said = [line for label, part in labels for line in about_calibration(f"{name}, {label}", part["calibration"])]
    off = [line for line in said if line["level"] == "warning"]
    if said and not off:
        return [say("note", "calibration", f"{name}: no evidence against the calibration of any label.")]
    return off


def _of_number(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    return []


OF_FORM = {"classes": _of_classes, "labels": _of_labels, "number": _of_number, "curve": about_survival}


def verdict(result: dict[str, Any], outcome: Outcome) -> list[dict[str, str]]:
    """Findings as {level: good | note | warning, code, text}, most general first."""
    small = outcome.small_sample(result["patients"], result["class_counts"], result["few"][0])
    said = [say("warning", *small)] if small else []
    for encoder, corpora in result["contamination"].items():
        text = contamination_warning(encoder, corpora)
        said.append(say("warning", "contaminated", f"{text[0].upper()}{text[1:]}."))
    names = [name for name, entry in result["models"].items() if not entry["control"]]
    names = names or [name for name in result["models"] if name == REFERENCE]
    for name in names:
        said += _about_model(name, result, outcome)
    said += about_shuffled(result, result["check"], outcome.title(result["check"]), result["chance"])
    said += _about_sites(result, outcome)
    for name in names:
        said += OF_FORM[outcome.form](name, result)
        said += about_groups(name, result, outcome) + _about_coverage(name, result)
    return said + about_intervals(result, names, outcome.title(outcome.primary))
