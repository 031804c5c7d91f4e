"""A bundle's predictions on a cohort of known outcomes: metrics with everything frozen."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from simulated_outcomes import table, written
from sklearn.metrics import roc_auc_score
from slidemake.core.failures import RunError
from slidemake.evaluation.evaluate import evaluate_tables
from slidemake.evaluation.external import evaluate_external, external_predictions, true_labels
from slidemake.evaluation.probabilities.conformal import conformal_limit
from slidemake.report.page import external_section, template_environment
from slidemake.tasks.labels import label_task

BUNDLE = {
    "classes": ["benign", "tumour"],
    "target": {"type": "binary", "classes": ["benign", "tumour"]},
    "model": "abmil",
    "fingerprint": "f" * 32,
    "threshold": 0.7,
    "training": {
        "patients": ["T1", "T2"],
        "validation": {"labels": [0, 1] * 20, "values": [[0.8, 0.2], [0.3, 0.7]] * 20},
    },
}


def files(folder, n=40, seed=0):
    """predictions/patients.csv and slides.csv of n patients, two slides each; the last patient has no label."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    prob = 1 / (1 + np.exp(-(rng.normal(size=n) + 2 * truth - 1)))
    with open(folder / "patients.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        figures = [f"{kind}_{name}" for kind in ("prob", "logit") for name in BUNDLE["classes"]]
        out.writerow(["patient_id", "site", "label", "repeat", "fold", *figures, "threshold", "predicted"])
        for i in range(n):
            called = ("benign", "tumour")[int(prob[i] >= 0.7)]
            logit = 2 * np.log(prob[i] / (1 - prob[i]))  # twice too extreme before the temperature
            out.writerow([f"X{i:02d}", "AB"[i // 2 % 2], "", "", "", 1 - prob[i], prob[i], 0, logit, 0.7, called])
    with open(folder / "slides.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["slide_id", "patient_id", "site", "status", "outcome"])
        for i in range(n):
            for k in range(2):
                label = "" if i == n - 1 or k else ("benign", "tumour")[truth[i]]
                out.writerow([f"X{i:02d}-{k}", f"X{i:02d}", "AB"[i // 2 % 2], "ok", label])
    return truth, prob


def run(folder, bundle=BUNDLE):
    outputs = {name: folder / f"{name}.json" for name in ("metrics", "curves")}
    options = {"bootstrap": 100}
    return evaluate_external(
        folder / "patients.csv", folder / "slides.csv", bundle, "outcome", options, table=folder / "m.csv", **outputs
    )


def test_metrics_are_those_of_the_predictions_with_the_bundles_threshold_and_limit(tmp_path):
    truth, prob = files(tmp_path)
    result = run(tmp_path)
    truth, prob = truth[:-1], prob[:-1]
    entry = result["models"]["abmil"]
    pooled = entry["scopes"]["pooled"]["metrics"]
    assert pooled["auroc"]["value"] == pytest.approx(roc_auc_score(truth, prob))
    assert pooled["sensitivity"]["value"] == pytest.approx((prob[truth == 1] >= 0.7).mean())
    assert result["external"] == {
        "bundle": "f" * 32,
        "model": "abmil",
        "label": "outcome",
        "threshold": 0.7,
        "trained_on": 2,
        "without_label": 1,
    }
    scores = np.array([0.2, 0.3] * 20)  # 1 - P(true class) of the bundle's validation patients
    limit = conformal_limit(scores, 0.1)
    held = 1 - np.where(truth == 1, prob, 1 - prob) <= limit + 1e-9
    assert entry["conformal"]["pooled"]["coverage"]["value"] == pytest.approx(held.mean())
    assert set(entry["conformal"]["sites"]) == {"A", "B"}
    assert entry["calibration"]["before"]["slope"] == pytest.approx(entry["calibration"]["slope"] / 2, rel=1e-3)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["external"] == result["external"]
    assert (tmp_path / "m.csv").read_text().startswith("model,metric,scope")


def test_patients_that_the_bundle_was_trained_on_stop_the_run(tmp_path):
    files(tmp_path)
    seen = {**BUNDLE, "training": {"patients": ["T1", "X03", "X05"]}}
    with pytest.raises(RunError, match="Leak: the bundle was trained on X03, X05"):
        run(tmp_path, seen)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"slide_id": "a", "other": "x"}], "no column 'outcome'; it has slide_id, other"),
        ([{"slide_id": "a", "outcome": "cancer"}], "has cancer, and the bundle tells benign from tumour"),
        (
            [
                {"slide_id": "a", "patient_id": "P", "outcome": "benign"},
                {"slide_id": "b", "patient_id": "P", "outcome": "tumour"},
            ],
            r"more: P \(benign, tumour\)",
        ),
    ],
)
def test_labels_that_cannot_be_used(rows, message):
    with pytest.raises(RunError, match=message):
        true_labels(rows, {"type": "binary", "label": "outcome"}, BUNDLE["classes"])


def test_nobody_with_a_label():
    row = {"patient_id": "a", "prob_benign": "0.5", "prob_tumour": "0.5", "predicted": "benign"}
    with pytest.raises(RunError, match="none of 1 predicted patients has a label"):
        external_predictions([row], {}, BUNDLE)


def test_one_patient_of_one_class_has_reasons(tmp_path):
    files(tmp_path, n=2)
    result = run(tmp_path, {**BUNDLE, "training": {"patients": []}})
    auroc = result["models"]["abmil"]["scopes"]["pooled"]["metrics"]["auroc"]
    assert auroc["reason"] == "no patient of class tumour among 1"
    assert result["models"]["abmil"]["conformal"] is None
    json.dumps(result, allow_nan=False)


OTHER = {
    "regression": ({"type": "regression", "unit": "%"}, "purity", ["purity"]),
    "survival": ({"type": "survival", "horizons": [2.0, 4.0, 8.0]}, "os", ["os_time", "os_event"]),
    "multilabel": ({"type": "multilabel", "labels": ["er", "pr"]}, "labels", ["er", "pr"]),
    "ordinal": ({"type": "ordinal", "classes": ["a", "b", "c"]}, "grade", ["grade"]),
}


def cells_of(kind, truth):
    if kind == "regression":
        return [f"{truth[0]:.12g}"]
    if kind == "survival":
        return [f"{truth[0]:.12g}", "yes" if truth[1] else "0"]
    if kind == "ordinal":
        return ["abc"[int(truth[0])]]
    return ["" if v < 0 else str(int(v)) for v in truth]


@pytest.mark.parametrize("kind", list(OTHER))
def test_bundles_that_tell_no_plain_classes(kind, tmp_path):
    """Metrics of the external cohort are those of the same values evaluated as a run of their own."""
    target, label, columns = OTHER[kind]
    made = table(kind, n=60, repeats=1)
    written(tmp_path / "oof.csv", kind, made)
    rows = list(csv.DictReader((tmp_path / "oof.csv").open()))
    with open(tmp_path / "patients.csv", "w", newline="") as handle:
        out = csv.DictWriter(handle, list(rows[0]))
        out.writeheader()
        out.writerows([{**row, "label": "", "repeat": "", "fold": ""} for row in rows])
    with open(tmp_path / "slides.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["slide_id", "patient_id", "site", "scanner", "status", *columns])
        for i, patient in enumerate(made.patients):
            out.writerow([f"{patient}-1", patient, made.sites[i], "AB"[i % 2], "ok", *cells_of(kind, made.truth[i])])
            out.writerow([f"{patient}-2", patient, made.sites[i], "AB"[i % 2], "ok", *[""] * len(columns)])
    classes = target.get("classes", [])
    bundle = {**BUNDLE, "classes": classes, "target": target, "threshold": None, "model": "m"}
    if kind in ("multilabel", "ordinal"):
        kept = {"labels": made.truth.astype(int).tolist(), "values": made.values[0].tolist()}
        bundle["training"] = {**BUNDLE["training"], "validation": kept}
    outputs = {name: tmp_path / f"{name}.json" for name in ("metrics", "curves")}
    args = (tmp_path / "patients.csv", tmp_path / "slides.csv", bundle, label, {"bootstrap": 50})
    result = evaluate_external(*args, table=tmp_path / "m.csv", **outputs)
    one_model = replace(made, fold=np.zeros_like(made.fold))  # a bundle has no folds: any two patients are compared
    expected, _ = evaluate_tables([one_model], {"bootstrap": 50})
    for name, figure in expected["models"]["m"]["scopes"]["pooled"]["metrics"].items():
        found = result["models"]["m"]["scopes"]["pooled"]["metrics"][name]["value"]
        assert found == pytest.approx(figure["value"], rel=1e-6), name
    assert result["external"]["trained_on"] == 2
    assert result["patients"] == 60
    if kind == "multilabel":  # of er every seventh is not known, of the bundle's patients as of the cohort's
        sets = {name: part["conformal"] for name, part in result["models"]["m"]["labels"].items()}
        assert {name: part["validation"]["least"] for name, part in sets.items()} == {"er": 51, "pr": 60}
        assert all(part["pooled"]["coverage"]["value"] >= 0.9 for part in sets.values())  # of the very same patients
    if kind == "ordinal":
        assert result["models"]["m"]["conformal"]["validation"] == {"least": 60, "most": 60}
        assert result["models"]["m"]["conformal"]["pooled"]["coverage"]["value"] >= 0.9
    assert set(result["models"]["m"]["subgroups"]["scanner"]["groups"]) == {"A", "B"}
    section = external_section(tmp_path)
    assert section["main"] == "m"
    page = template_environment().get_template("report_external.html.j2").render(task=section)
    assert "External cohort: m" in page
    # besides those of calibration: three horizons; of two labels each three diagrams and one of abstention
    of_probabilities = {"survival": 3, "multilabel": 8, "ordinal": 4}.get(kind, 0)
    assert page.count("<figure") == len(section["pictures"]) + of_probabilities > of_probabilities
    seen = {**bundle, "training": {"patients": ["P003"]}}
    with pytest.raises(RunError, match="Leak: the bundle was trained on P003"):
        evaluate_external(*args[:2], seen, *args[3:], table=tmp_path / "m.csv", **outputs)


def test_truths_that_are_none():
    row = {"slide_id": "a", "os_time": "soon", "os_event": "1"}
    with pytest.raises(RunError, match='slide a, column os_time: "soon" is not a number'):
        true_labels([row], {"type": "survival", "label": "os"})
    assert true_labels(
        [{**row, "os_time": "3"}, {**row, "slide_id": "b", "os_time": ""}], {"type": "survival", "label": "os"}
    ) == {"a": "3"}
    with pytest.raises(RunError, match=r"several labels .er, pr.. Write `bundle_label: labels`"):
        label_task({"target": {"type": "multilabel", "labels": ["er", "pr"]}}, "er")
