"""What the figures of a task that is no plain classes allow one to say, in plain language."""

from __future__ import annotations

from typing import Any

from slidemake.evaluation.verdict import (
    GAP,
    SMALL,
    about_calibration,
    about_groups,
    about_intervals,
    about_shuffled,
    about_sites_split,
    beats_controls,
    interval,
    pooled,
    rivals_of,
    say,
)
from slidemake.tasks.controls import REFERENCE, SITE_ONLY

FEW_EVENTS = 5  # expected events below which nothing is said of the calibration of survival

TITLES = {
    "c_index": "C-index",
    "c_uno": "Uno's C",
    "td_auc": "time-dependent AUC",
    "ibs": "integrated Brier score",
    "r2": "R²",
    "mae": "mean absolute error",
    "rmse": "RMSE",
    "pearson": "correlation",
    "slope": "slope",
    "kappa": "quadratic kappa",
    "auroc": "macro AUROC",
}


def _about_size(result: dict[str, Any]) -> list[dict[str, str]]:
    count, what = result["few"]
    if count >= SMALL:
        return []
    of = f"{count} {what}" if what == "patients" else f"{result['patients']} patients, {count} of them {what}"
    if what.startswith("of the"):
        of = f"{count} patients {what}"
    text = f"Small sample: {of}. Read the intervals, not the figures, and confirm on another cohort."
    return [say("warning", "small_sample", text)]


def _about_sites(result: dict[str, Any]) -> list[dict[str, str]]:
    said, metric = [], result["check"]
    site = pooled(result, SITE_ONLY, metric)
    if site and site["low"] is not None and site["low"] > result["chance"]:
        level, advice = about_sites_split(result.get("split"))
        text = f"The site alone predicts the label with {TITLES[metric]} {interval(site)}. {advice}"
        said.append(say(level, "site_predicts_label", text))
    for name, figures in result["confounding"]["within_site"].items():
        if figures and figures["pooled"] - figures["within"] > GAP:
            text = f"{name}: {TITLES[result['primary']]} is {figures['pooled']:.2f} over all patients but "
            text += f"{figures['within']:.2f} within sites: part of it comes from differences between sites."
            said.append(say("warning", "between_sites", text))
    return said


def _about_risk_groups(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Survival: do the groups at the threshold from validation differ?"""
    test = result["models"][name].get("log_rank")
    if test is None:
        return []
    if test["p"] is None:
        return [say("note", "log_rank", f"{name}: no log-rank test, because {test['reason']}.")]
    found = {"value": test["hazard_ratio"], **{key: test[key] for key in ("low", "high")}}
    text = f"{name}: divided at the median risk of validation patients, the hazard of the high-risk group is "
    text += f"{interval(found)} times that of the low-risk group (log-rank p {test['p']:.2g}"
    each = [t["p"] for t in result["models"][name]["log_rank_by_repeat"] if t["p"] is not None]
    text += f"; by repeat {min(each):.2g} to {max(each):.2g})." if len(each) > 1 else ")."
    return [say("good" if test["p"] < 0.05 and test["hazard_ratio"] > 1 else "note", "log_rank", text)]


def _about_brier(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Survival: are the predicted probabilities worth more than the cohort's own curve?"""
    own, curve = pooled(result, name, "ibs"), pooled(result, "kaplan_meier", "ibs")
    if not own or not curve or own["value"] is None or curve["value"] is None:
        return []
    text = f"{name}: integrated Brier score {interval(own)}; the Kaplan-Meier curve of the whole cohort has "
    text += f"{interval(curve)}"
    apart = rivals_of(name, result, "ibs").get("kaplan_meier")
    if apart is None:
        return [say("note", "calibration", f"{text}.")]
    text += f", a difference of {interval(apart, 'difference')}"
    if apart["high"] < 0:
        return [say("note", "calibration", f"{text}: its probabilities carry information.")]
    if apart["low"] > 0:
        return [say("warning", "miscalibrated", f"{text}: do not read its survival probabilities as such.")]
    return [
        say("note", "calibration", f"{text}, which includes 0: not shown that its probabilities carry information.")
    ]


def _about_expected(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Survival: are as many events predicted as are seen? Nothing is said where fewer than FEW_EVENTS are expected."""
    calibration = result["models"][name]["calibration"]
    at = calibration["middle"]
    found = calibration["horizons"][at]
    if found["ratio"] is None:
        return []
    text = f"{name}: by time {float(at):g}, {found['events']} events are seen"
    text += f" and {found['expected_events']:.1f} expected from the predictions over the same follow-up"
    if found["expected_events"] < FEW_EVENTS:
        text += f": fewer than {FEW_EVENTS} are too few to judge its survival probabilities."
        return [say("note", "expected_events", text)]
    ratio = _ratio(found)
    text += f"; the ratio is {interval(ratio)}"
    if ratio["low"] <= 1 <= ratio["high"]:
        said = [say("note", "expected_events", f"{text}: not shown to be wrong on average.")]
    else:
        direction = "few" if ratio["low"] > 1 else "many"
        said = [say("warning", "expected_events", f"{text}: it predicts too {direction} events in this cohort.")]
    measured = {
        site: part["horizons"][at]
        for site, part in calibration["sites"].items()
        if part["horizons"] and part["horizons"][at]["expected_events"] >= FEW_EVENTS
    }
    off = [
        f"{site} ({interval(_ratio(part))})"
        for site, part in measured.items()
        if not part["ratio_low"] <= 1 <= part["ratio_high"]
    ]
    if off:
        text = (
            f"{name}: the ratio of seen to expected events by time {float(at):g} leaves 1 out at {', '.join(off)}, of "
            f"{len(measured)} sites where at least {FEW_EVENTS} are expected (one of twenty does by chance): do not "
            "read its survival probabilities there."
        )
        said.append(say("warning", "site_calibration", text))
    return said


def _ratio(found: dict[str, Any]) -> dict[str, Any]:
    return {"value": found["ratio"], "low": found["ratio_low"], "high": found["ratio_high"]}


def _about_labels(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Several labels: those whose probabilities are off, or that none is shown to be."""
    labels = result["models"][name]["labels"].items()
    said = [line for label, part in labels for line in about_calibration(f"{name}, {label}", part["calibration"])]
    off = [line for line in said if line["level"] == "warning"]
    if said and not off:
        return [say("note", "calibration", f"{name}: no evidence against the calibration of any label.")]
    return off


def outcome_verdict(result: dict[str, Any], contaminated: list[str]) -> list[dict[str, str]]:
    """Findings as {level: good | note | warning, code, text}, most general first."""
    said = _about_size(result)
    said += [say("warning", "contaminated", f"{text[0].upper()}{text[1:]}.") for text in contaminated]
    names = [name for name, entry in result["models"].items() if not entry["control"]]
    names = names or [name for name in result["models"] if name == REFERENCE]
    for name in names:
        said += beats_controls(name, result, result["primary"], TITLES[result["primary"]])
    said += about_shuffled(result, result["check"], TITLES[result["check"]], result["chance"]) + _about_sites(result)
    for name in names if result["type"] == "survival" else ():
        said += _about_risk_groups(name, result) + _about_brier(name, result) + _about_expected(name, result)
    for name in names if result["type"] == "ordinal" else ():
        said += about_calibration(name, result["models"][name]["calibration"])
    for name in names if result["type"] == "multilabel" else ():
        said += _about_labels(name, result)
    for name in names:
        said += about_groups(name, result, result["primary"], TITLES[result["primary"]])
    return said + about_intervals(result)
