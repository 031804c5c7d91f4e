"""Sentences of the verdict against figures made by hand: none claims more than its figures."""

from __future__ import annotations

import pytest
from slidemake.evaluation.verdict import (
    about_calibration,
    about_groups,
    about_sites_split,
    against_controls,
    shuffled_control,
)
from slidemake.tasks.classes import ClassOutcome

FIGURES = {"mean_pool_lr": (0.7, 0.6, 0.8), "prevalence": (0.5, 0.5, 0.5), "site_only": (0.55, 0.4, 0.7)}


def figure(value, low, high):
    return {"value": value, "low": low, "high": high}


def against(**rivals):
    """Findings of a model of AUROC 0.8 whose differences from controls are (difference, low, high, p_holm)."""
    table = {name: dict(zip(("difference", "low", "high", "p_holm"), c, strict=True)) for name, c in rivals.items()}
    return against_controls("m", "AUROC", figure(0.8, 0.7, 0.9), table, lambda name: figure(*FIGURES[name]))


@pytest.mark.parametrize(
    ("rivals", "level", "code"),
    [
        ({}, "note", "no_comparison"),
        ({"prevalence": (0.3, 0.2, 0.4, None)}, "note", "above_chance"),  # an external cohort has no other control
        ({"prevalence": (0.3, -0.1, 0.4, None)}, "warning", "not_better"),
        ({"prevalence": (-0.3, -0.4, -0.2, None)}, "warning", "worse_than_control"),
        ({"prevalence": (0.3, 0.2, 0.4, None), "mean_pool_lr": (0.1, 0.02, 0.2, 0.01)}, "good", "better_than_controls"),
        ({"prevalence": (0.3, 0.2, 0.4, None), "mean_pool_lr": (0.1, 0.02, 0.2, 0.11)}, "warning", "not_better"),
        ({"prevalence": (0.3, 0.2, 0.4, None), "mean_pool_lr": (0.1, -0.1, 0.2, 0.3)}, "warning", "not_better"),
        ({"mean_pool_lr": (0.1, 0.02, 0.2, 0.01), "site_only": (0.25, 0.1, 0.4, 0.2)}, "warning", "not_better"),
        ({"mean_pool_lr": (-0.1, -0.2, -0.02, 0.01)}, "warning", "worse_than_control"),
    ],
)
def test_better_needs_a_control_an_interval_and_the_correction(rivals, level, code):
    (said,) = against(**rivals)
    assert (said["level"], said["code"]) == (level, code)
    assert ("better than the controls in" in said["text"]) == (level == "good")
    if set(rivals) == {"prevalence"}:
        assert "control" not in said["text"]


@pytest.mark.parametrize(
    ("interval", "level"),
    [((0.45, 0.55), "good"), ((0.0, 0.88), "note"), ((0.6, 0.7), "warning"), ((0.3, 0.4), "note")],
)
def test_a_wide_interval_clears_no_control(interval, level):
    (said,) = shuffled_control("AUROC", figure(sum(interval) / 2, *interval), 0.5)
    assert said["level"] == level


def test_calibration_is_not_assessed_on_a_few_patients():
    null = {"mean": 0.1, "p95": 0.2}
    about = {n: about_calibration("m", {"ece": 0.1, "ece_if_calibrated": null, "n": n})[0]["text"] for n in (6, 49, 50)}
    assert "with 6 patients calibration cannot be assessed" in about[6]
    assert "cannot be assessed" in about[49]
    assert "no evidence against calibration" in about[50]


def test_groups_that_are_too_small_are_named():
    groups = {"a": {"n": 285, "reason": None}, "b": {"n": 15, "reason": "15 patients; 20 are needed"}}
    result = {"models": {"m": {"subgroups": {"ethnicity": {"groups": groups, "gaps": {}}}}}}
    (said,) = about_groups("m", result, ClassOutcome(["n", "t"]))
    assert said["code"] == "subgroup_unknown"
    assert "by ethnicity is not known for b (15)" in said["text"]


def test_advice_about_sites_knows_the_split():
    assert "use leave-one-site-out" in about_sites_split("kfold")[1]
    for method in ("leave_one_site_out", "site_preserved", None):
        assert "use leave-one-site-out" not in about_sites_split(method)[1]
