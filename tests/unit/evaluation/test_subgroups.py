"""Groups of patients by columns of the sheet, their gaps, and calibration before and after temperature, per site."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated import as_table, by_group, evaluate_classes, simulate
from sklearn.metrics import brier_score_loss, roc_auc_score
from slidemake.evaluation.evaluate import DEFAULTS
from slidemake.evaluation.files import metrics_table
from slidemake.evaluation.probabilities.calibration import calibration_report
from slidemake.evaluation.scopes import Draws, group_scopes
from slidemake.evaluation.subgroups import group_members, patient_values
from slidemake.statistics.temperature import probabilities

OPTIONS = {**DEFAULTS, "bootstrap": 200}


def test_figures_of_a_group_are_those_of_its_patients():
    p = simulate(weaker=1.5)
    found = group_scopes(as_table(p), "scanner", by_group(p), Draws(OPTIONS))
    for group in "AB":
        inside = np.array(p.sites) == group
        expected = np.mean([roc_auc_score(p.labels[inside], prob[inside, 1]) for prob in p.prob])
        assert found["groups"][group]["metrics"]["auroc"]["value"] == pytest.approx(expected)
    gap = found["gaps"]["auroc"]
    assert (gap["worst"], gap["best"]) == ("B", "A")
    values = {g: found["groups"][g]["metrics"]["auroc"]["value"] for g in "AB"}
    assert gap["gap"]["value"] == pytest.approx(values["A"] - values["B"])
    assert gap["gap"]["low"] < gap["gap"]["value"] < gap["gap"]["high"]
    assert gap["p"] < 0.01
    assert gap["gap"]["value"] > gap["gap_by_chance"]
    brier = found["gaps"]["brier"]
    assert (brier["worst"], brier["gap"]["value"] > 0, brier["gap"]["low"] is not None) == ("B", True, True)


def test_gap_between_groups_that_do_not_differ_is_that_of_chance():
    """p is uniform without a difference: of 40 cohorts 2 below 0.05 are expected; 8 or more have p < 0.001."""
    found = []
    for seed in range(40):
        p = simulate(n=80, groups=2, repeats=1, seed=seed)
        gaps = group_scopes(as_table(p), "scanner", by_group(p), Draws({**OPTIONS, "bootstrap": 100}))["gaps"]
        found.append(gaps["auroc"]["p"])
    assert sum(p < 0.05 for p in found) < 8


def test_small_groups_have_reasons_and_no_figures():
    p = simulate(n=60)
    values = by_group(p)
    for i, patient in enumerate(p.patients):
        values[patient] = "few" if i < 6 else "one class" if i % 2 and i < 50 else "large" if i < 58 else ""
    found = group_scopes(as_table(p), "stain", values, Draws({**OPTIONS, "subgroup_class": 4}))
    assert found["groups"]["few"]["reason"] == "6 patients; 20 are needed"
    assert found["groups"]["one class"]["reason"] == "0 of class n; 4 of each are needed"
    assert found["groups"]["large"]["reason"] is None
    assert (found["unstated"], found["gaps"]) == (2, {})


def test_values_of_a_column_per_patient():
    rows = [
        {"slide_id": "1", "patient_id": "A", "scanner": "S2", "age": "41", "sex": "f", "scan_date": "2020-03-01"},
        {"slide_id": "2", "patient_id": "A", "scanner": "S1", "age": "43", "sex": "", "scan_date": "2021-03-01"},
        {"slide_id": "3", "patient_id": "B", "scanner": "S1", "age": "", "sex": "m", "scan_date": ""},
        {"slide_id": "4", "patient_id": "C", "scanner": "S1", "status": "failed", "age": "7", "sex": "m"},
    ]
    rows += [{"slide_id": f"x{i}", "scanner": "S3", "age": str(50 + i), "sex": "f"} for i in range(8)]
    assert {k: v for k, v in patient_values(rows, "scanner").items() if k in "ABC"} == {"A": "S1+S2", "B": "S1"}
    assert patient_values(rows, "sex")["A"] == "f"
    assert patient_values(rows, "scan_date") == {"A": "2020+2021", "B": "", **{f"x{i}": "" for i in range(8)}}
    ages = patient_values(rows, "age")  # 42, 50 .. 57: thirds at 51.67 and 54.33
    assert ages["A"] == ages["x1"] == "up to 51.67"
    assert ages["x2"] == "51.67 to 54.33"
    assert (ages["x5"], ages["B"]) == ("above 54.33", "")
    assert [*group_members(tuple(ages), ages)[0]] == ["up to 51.67", "51.67 to 54.33", "above 54.33"]


def test_subgroups_are_in_the_table_and_in_words():
    p = simulate(weaker=2.5)
    result, _ = evaluate_classes([replace(p, name="abmil")], {"bootstrap": 100}, groups={"scanner": by_group(p)})
    assert "abmil,auroc,group:scanner=B," in metrics_table(result)
    [said] = [f["text"] for f in result["verdict"] if f["code"] == "subgroup_gap"]
    assert "scanner" in said
    json.dumps(result, allow_nan=False)


def test_calibration_before_and_after_temperature_at_each_site():
    p = simulate(n=400, temperature=3.0)
    found = calibration_report(p, OPTIONS)
    before, after = found["before"], found
    raw = probabilities(p.logits).mean(0)[:, 1]
    assert before["brier"] == pytest.approx(brier_score_loss(p.labels, raw))
    assert after["brier"] == pytest.approx(brier_score_loss(p.labels, p.prob.mean(0)[:, 1]))
    assert before["ece"] > after["ece"] + 0.03
    assert before["slope"] < 0.5 < after["slope"]  # three times too extreme, and right
    for site in "AB":
        inside = np.array(p.sites) == site
        assert found["sites"][site]["after"]["brier"] == pytest.approx(
            brier_score_loss(p.labels[inside], p.prob.mean(0)[inside, 1])
        )
        assert sum(row["count"] for row in found["sites"][site]["after"]["table"]) == 200
    few = calibration_report(simulate(n=12), OPTIONS)
    assert few["sites"]["A"]["reason"] == "6 patients; 10 are needed"
    assert calibration_report(replace(p, logits=None), OPTIONS)["before"] is None


@pytest.mark.parametrize("case", ["three patients", "one site", "one class in a site", "constant", "one class"])
def test_bad_input_gives_reasons_and_no_nan(case):
    p = simulate(n=3 if case == "three patients" else 40, repeats=1)
    if case == "one site":
        p = replace(p, sites=("A",) * 40)
    elif case == "one class in a site":
        p = replace(p, sites=tuple("nt"[label] for label in p.labels))
    elif case == "constant":
        level = np.full(p.prob.shape, 0.5)
        p = replace(p, prob=level, logits=np.zeros_like(level), predicted=np.zeros_like(p.predicted))
    elif case == "one class":
        p = replace(p, labels=np.zeros(40, int))
    p = replace(p, name="abmil", validation={(0, 0): (p.prob[0][:2], p.labels[:2])})
    other = replace(p, name="other")
    result, curves = evaluate_classes([p, other], {"bootstrap": 100}, groups={"site": by_group(p)})
    text = json.dumps([result, curves], allow_nan=False)
    assert "NaN" not in text
    for entry in result["models"].values():
        for scope in entry["scopes"].values():
            assert all((m["value"] is None) == (m["reason"] is not None) for m in scope["metrics"].values())
    assert "nan" not in metrics_table(result).lower()
