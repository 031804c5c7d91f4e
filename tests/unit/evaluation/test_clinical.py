"""Decisions at the frozen threshold, sites, ruling out and in; AUROCs with two intervals; of simulated cohorts."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from simulated import as_table, evaluate_classes, simulate
from sklearn.metrics import confusion_matrix, roc_auc_score
from slidemake.evaluation.aurocs import of_procedure, ranked_patients, training_ratio
from slidemake.evaluation.clinical import clinical
from slidemake.report.clinical import clinical_section
from slidemake.report.page import template_environment
from slidemake.statistics.auroc_intervals import auroc_interval
from slidemake.statistics.decision_values import thresholds_for

OPTIONS = {"level": 0.95, "prevalence": 0.05}


def validated(p):
    """With validation patients drawn as the tested ones were."""
    like = simulate(seed=9)
    return replace(p, validation={(r, f): (like.prob[0][:60], like.labels[:60]) for r in p.repeats for f in range(4)})


def test_decisions_are_those_of_the_repeats():
    p = simulate(repeats=2)
    found = clinical(p, p.prob, 0.8, OPTIONS)["decisions"]
    counts = np.mean([confusion_matrix(p.labels, row).ravel() for row in p.predicted], axis=0)  # tn, fp, fn, tp
    assert found["counts"] == [counts[3], counts[2], counts[1], counts[0]]
    assert found["sensitivity"]["value"] == pytest.approx(counts[3] / (counts[3] + counts[2]))
    assert found["ppv"]["value"] == pytest.approx(counts[3] / (counts[3] + counts[1]))
    assert found["at_prevalence"]["ppv"]["value"] < found["ppv"]["value"] - 0.2  # a tenth as common
    assert "at_prevalence" not in clinical(p, p.prob, 0.8, {"level": 0.95})["decisions"]


def test_ruling_out_and_in_is_by_validation_patients():
    p = validated(simulate(repeats=1, n=400))
    found = clinical(p, p.prob, 0.8, OPTIONS)["ruled"]
    prob, labels = p.validation[0, 0]
    limits = thresholds_for(labels == 1, prob[:, 1])
    out = p.prob[0, :, 1] < limits["rule_out"]
    assert found["thresholds"] == limits
    assert found["ruled_out"] == pytest.approx(out.mean())
    assert found["sensitivity_of_out"]["value"] == pytest.approx((~out)[p.labels == 1].mean())
    assert found["npv_of_out"]["value"] == pytest.approx((p.labels[out] == 0).mean())
    within = p.prob[0, :, 1] >= limits["rule_in"]
    assert found["specificity_of_in"]["value"] == pytest.approx((~within)[p.labels == 0].mean())
    assert found["ppv_of_in"]["value"] == pytest.approx((p.labels[within] == 1).mean())
    assert clinical(replace(p, validation=None), p.prob, 0.8, OPTIONS)["ruled"] is None


def test_a_site_with_other_probabilities_is_seen():
    """At site B all log-odds are 1.5 too high: the frozen threshold calls too many, the site's own would not, and
    moving its intercept mends the Brier score."""
    p = simulate(n=400, repeats=2)
    at_b = np.array(p.sites) == "B"
    odds = np.log(p.prob[..., 1] / p.prob[..., 0]) + 1.5 * at_b
    prob = np.stack([1 / (1 + np.exp(odds)), 1 / (1 + np.exp(-odds))], -1)
    p = replace(p, prob=prob, predicted=(prob[..., 1] >= 0.5).astype(int))
    sites = clinical(p, p.prob, 0.8, OPTIONS)["sites"]
    assert sites["B"]["frozen"]["specificity"]["high"] < sites["A"]["frozen"]["specificity"]["low"]
    assert sites["B"]["own"]["specificity"]["value"] > sites["B"]["frozen"]["specificity"]["value"] + 0.1
    large = sites["B"]["calibration"]["in_the_large"]
    assert large["low"] < -1.5 < large["high"]
    assert sites["B"]["calibration"]["brier_updated"] < sites["B"]["calibration"]["brier"] - 0.02
    assert abs(sites["A"]["calibration"]["in_the_large"]["value"]) < 0.5
    assert sites["B"]["calibration"]["observed_to_expected"]["high"] < 1


def test_sites_that_cannot_be_judged_say_so():
    p = simulate(n=40, groups=2)
    p = replace(p, sites=("C", "C", *p.sites[2:30], *["D"] * 10), labels=np.r_[p.labels[:30], np.zeros(10, int)])
    sites = clinical(p, p.prob, 0.8, OPTIONS)["sites"]
    assert "figures need at least 5" in sites["C"]["reason"]
    assert "of one class" in sites["D"]["reason"]


def test_over_sites_and_sizes():
    p = simulate(n=200, groups=4)
    found = clinical(p, p.prob, 0.8, OPTIONS)
    over = found["over_sites"]
    assert over["sites"] == 4
    assert over["new_low"] < over["low"] < over["value"] < over["high"] < over["new_high"]
    assert found["sizes"]["known_to"] < 0.1
    assert clinical(replace(p, sites=("A",) * 200), p.prob, 0.8, OPTIONS)["over_sites"] is None


def test_aurocs_and_their_two_intervals():
    p = simulate(n=80, repeats=2)
    metrics, _ = evaluate_classes([p], {"bootstrap": 50})
    entry, table = metrics["models"]["m"], as_table(p)
    scores = [roc_auc_score(p.labels, row[:, 1]) for row in p.prob]
    pooled = entry["scopes"]["pooled"]["metrics"]["auroc"]
    assert pooled["value"] == pytest.approx(np.mean(scores))
    assert (pooled["low"], pooled["high"]) == auroc_interval(ranked_patients(table))
    one = entry["scopes"]["repeat:1"]["metrics"]["auroc"]
    assert (one["low"], one["high"]) == auroc_interval(ranked_patients(table, None, 1))
    assert training_ratio(table) == pytest.approx(80 / 60)
    wider = entry["procedure"]["auroc"]
    assert wider["low"] < pooled["low"] < pooled["high"] < wider["high"]
    whole = replace(table, fold=np.zeros_like(table.fold))  # another cohort, or one test set: nobody was trained here
    assert training_ratio(whole) == 0
    assert of_procedure(whole, 0.95) is None
    [text] = [line["text"] for line in metrics["verdict"] if line["code"] == "intervals"]
    assert f"m {wider['low']:.2f} to {wider['high']:.2f}" in text


def test_inverted_labels_have_a_sentence_of_their_own():
    p = simulate(n=120)
    metrics, _ = evaluate_classes([replace(p, prob=p.prob[..., ::-1])], {"bootstrap": 50})
    assert "below_chance" in {line["code"] for line in metrics["verdict"]}
    metrics, _ = evaluate_classes([p], {"bootstrap": 50})
    assert "below_chance" not in {line["code"] for line in metrics["verdict"]}


def test_the_report_shows_it():
    p = validated(simulate(n=160, groups=3))
    metrics, _ = evaluate_classes([p], {"bootstrap": 50, "prevalence": 0.05})
    section = clinical_section(metrics, "m")
    html = template_environment().get_template("report_clinical.html.j2").render(task=SimpleNamespace(clinical=section))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    found = metrics["models"]["m"]["clinical"]
    for figure in (found["decisions"]["ppv"], found["decisions"]["at_prevalence"]["ppv"]):
        assert f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})" in text.replace(" ( ", " (")
    assert "at 5.0 %" in text
    assert "are ruled out" in text
    assert "Over 3 sites the mean AUROC is" in text
    assert "data:image/svg+xml" in html
