"""What the figures of survival allow one to say: groups of risk, the worth of probabilities, events expected."""

from __future__ import annotations

from typing import Any

from slidemake.evaluation.result import interval, pooled, rivals_of, say

FEW_EVENTS = 5  # expected events below which nothing is said of the calibration of survival


def about_survival(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    return _about_risk_groups(name, result) + _about_brier(name, result) + _about_expected(name, result)


def _about_risk_groups(name: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """Do the groups at the threshold from validation differ?"""
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
    """Are the predicted probabilities worth more than the cohort's own curve?"""
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
    """Are as many events predicted as are seen? Nothing is said where fewer than FEW_EVENTS are expected."""
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
