"""Predictions of all models of a task to metrics.json, metrics.csv and curves.json."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from simulated import evaluate_classes
from sklearn.metrics import average_precision_score, roc_auc_score
from slidemake.core.failures import RunError
from slidemake.evaluation.evaluate import evaluate
from slidemake.evaluation.files import metrics_table
from slidemake.statistics.association import association_test
from slidemake.statistics.auroc_intervals import auroc_difference, auroc_interval, ranked
from slidemake.statistics.bootstrap import bootstrap_indices, percentile_interval, scope_seed
from slidemake.statistics.sizes import bins_for
from slidemake.statistics.temperature import auroc
from slidemake.tasks.class_predictions import ClassPredictions, without_prevalence
from slidemake.tasks.prediction_table import read_predictions

FEW = {"bootstrap": 100, "seed": 5}


def simulate(name, signal, n=40, repeats=3, folds=5, seed=0, classes=("benign", "tumour"), sites=2, by_site=0.0):
    """Predictions whose scores are `signal` apart between classes; `by_site` ties the label to the site."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(classes)
    follows = np.random.default_rng(99).random(n) < by_site
    site = np.where(follows, labels % sites, (np.arange(n) // len(classes)) % sites)
    prob = np.empty((repeats, n, len(classes)))
    own = rng.normal(size=(n, len(classes)))
    for r in range(repeats):
        logits = own + rng.normal(size=own.shape) * 0.3
        logits[np.arange(n), labels] += signal
        prob[r] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    fold = np.stack([rng.permutation(np.arange(n) % folds) for _ in range(repeats)])
    patients = tuple(f"P{i:03d}" for i in range(n))
    names = tuple("ABCDEFG"[s] for s in site)
    return ClassPredictions(name, classes, patients, names, labels, tuple(range(repeats)), prob, prob.argmax(2), fold)


def write(p: ClassPredictions, path, threshold=0.5):
    with open(path, "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(
            [
                "patient_id",
                "site",
                "label",
                "repeat",
                "fold",
                *[f"prob_{c}" for c in p.classes],
                "threshold",
                "predicted",
            ]
        )
        for r, repeat in enumerate(p.repeats):
            for i, patient in enumerate(p.patients):
                chosen = p.classes[int(p.prob[r, i, 1] >= threshold)]
                label = p.classes[p.labels[i]]
                numbers = [f"{v:.9f}" for v in p.prob[r, i]]
                out.writerow([patient, p.sites[i], label, repeat, p.fold[r, i], *numbers, threshold, chosen])
    return path


def cohort(**more):
    signals = {"gated_abmil": 2.5, "mean_pool_lr": 0.5, "site_only": 0.0, "shuffled_label": 0.0}
    return [simulate(name, signal, seed=i, **more) for i, (name, signal) in enumerate(signals.items())]


@pytest.fixture(scope="module")
def result():
    return evaluate_classes(cohort(), FEW)[0]


def test_pooled_is_the_mean_over_repeats_with_a_brute_force_interval(result):
    p = cohort()[0]
    pooled = result["models"]["gated_abmil"]["scopes"]["pooled"]["metrics"]
    of_repeats = [roc_auc_score(p.labels, prob[:, 1]) for prob in p.prob]
    assert pooled["auroc"]["value"] == pytest.approx(np.mean(of_repeats), abs=1e-12)
    indices, _ = bootstrap_indices(p.labels, 100, scope_seed(5, "pooled"))
    precision = [
        np.mean([average_precision_score(p.labels[chosen], prob[chosen, 1]) for prob in p.prob]) for chosen in indices
    ]
    assert (pooled["auprc"]["low"], pooled["auprc"]["high"]) == pytest.approx(percentile_interval(np.array(precision)))
    of_auroc = (pooled["auroc"]["low"], pooled["auroc"]["high"])  # not the bootstrap's: tests/unit/statistics
    assert of_auroc == auroc_interval(ranked(p.labels, p.prob[..., 1]))
    scopes = result["models"]["gated_abmil"]["scopes"]
    assert scopes["repeat:1"]["metrics"]["auroc"]["value"] == pytest.approx(of_repeats[1], abs=1e-12)
    ensemble = scopes["ensemble"]["metrics"]
    assert ensemble["auroc"]["value"] == pytest.approx(roc_auc_score(p.labels, p.prob.mean(0)[:, 1]))
    assert "accuracy" not in ensemble  # a mean of probabilities has no threshold of its own


def test_fold_and_site_scopes(result):
    p = cohort()[0]
    scopes = result["models"]["gated_abmil"]["scopes"]
    assert sum(name.startswith("fold:") for name in scopes) == 15
    inside = p.fold[1] == 2
    fold = scopes["fold:1/2"]
    assert (fold["n"], fold["positives"]) == (8, int(p.labels[inside].sum()))
    assert fold["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(p.labels[inside], p.prob[1, inside, 1]))
    at_b = np.array(p.sites) == "B"
    expected = np.mean([roc_auc_score(p.labels[at_b], prob[at_b, 1]) for prob in p.prob])
    assert scopes["site:B"]["metrics"]["auroc"]["value"] == pytest.approx(expected)
    spread = result["models"]["gated_abmil"]["spread"]["folds"]["auroc"]
    values = [scopes[f"fold:{r}/{f}"]["metrics"]["auroc"]["value"] for r in range(3) for f in range(5)]
    values = [v for v in values if v is not None]
    assert spread["sd"] == pytest.approx(np.std(values, ddof=1))
    assert spread["n"] + spread["undefined"] == 15
    assert spread["se_corrected"] == pytest.approx(spread["sd"] * np.sqrt(1 / len(values) + 1 / 4))


def test_controls_and_paired_differences(result):
    assert result["models"]["prevalence"]["scopes"]["pooled"]["metrics"]["auroc"]["value"] == 0.5
    assert result["models"]["prevalence"]["scopes"]["pooled"]["metrics"]["brier"]["value"] == pytest.approx(0.25)
    [pair] = [c for c in result["comparisons"] if (c["model"], c["reference"]) == ("gated_abmil", "mean_pool_lr")]
    a, b = cohort()[:2]
    indices, _ = bootstrap_indices(a.labels, 100, scope_seed(5, "pooled"))

    def mean_precision(p, chosen):
        return np.mean([average_precision_score(p.labels[chosen], prob[chosen, 1]) for prob in p.prob])

    draws = np.array([mean_precision(a, chosen) - mean_precision(b, chosen) for chosen in indices])
    found = pair["metrics"]["auprc"]
    assert (found["low"], found["high"]) == pytest.approx(percentile_interval(draws))
    # 40 patients in five folds, each trained on 32: of the way of training
    tested = auroc_difference(*(ranked(p.labels, p.prob[..., 1]) for p in (a, b)), tested_to_trained=40 / 32)
    found = pair["metrics"]["auroc"]
    assert (found["low"], found["high"]) == (tested["low"], tested["high"])
    assert pair["delong"]["p"] == tested["p"]
    codes = {finding["code"] for finding in result["verdict"]}
    assert {"better_than_controls", "shuffled_at_chance", "site_balanced", "intervals"} <= codes


def test_each_row_brings_its_own_threshold(tmp_path):
    p = simulate("m", 1.0, repeats=1)
    path = write(p, tmp_path / "p.csv", threshold=0.8)
    assert (read_predictions(path, "m", "binary").decisions[..., 0] == (p.prob[..., 1] >= 0.8)).all()


def test_files_round_trip_and_are_deterministic(tmp_path):
    models = cohort()
    paths = [write(p, tmp_path / f"{p.name}.csv") for p in models]
    names = [p.name for p in models]
    outputs = [tmp_path / name for name in ("metrics.json", "metrics.csv", "curves.json")]
    evaluate(paths, names, "binary", FEW, *outputs)
    before = [path.read_bytes() for path in outputs]
    evaluate(paths, names, "binary", FEW, *outputs)
    assert before == [path.read_bytes() for path in outputs]
    rows = list(csv.DictReader(outputs[1].open()))
    assert list(rows[0])[:8] == ["model", "metric", "scope", "value", "low", "high", "n", "positives"]
    assert {row["model"] for row in rows} == {*names, "prevalence"}
    [row] = [r for r in rows if (r["model"], r["metric"], r["scope"]) == ("gated_abmil", "auroc", "pooled")]
    stored = json.loads(before[0])["models"]["gated_abmil"]["scopes"]["pooled"]["metrics"]["auroc"]
    assert float(row["value"]) == pytest.approx(stored["value"], rel=1e-5)
    curves = json.loads(before[2])["models"]["gated_abmil"]
    assert curves["roc"]["fpr"][0] == 0
    assert sum(point["count"] for point in curves["calibration"]) == 40


def test_one_class_site_and_small_site_have_reasons():
    models = cohort()
    sites = np.array(["A"] * 40, dtype=object)
    sites[:6:2] = "one class"
    sites[10:14] = "small"
    sites[20:26:2] = sites[30:34:2] = "benign only"
    result, _ = evaluate_classes([replace(m, sites=tuple(sites)) for m in models], FEW)
    scopes = result["models"]["gated_abmil"]["scopes"]
    assert "4 patients; figures need at least 5" in scopes["site:small"]["reason"]
    assert "no patient of class tumour" in scopes["site:benign only"]["reason"]
    assert scopes["site:benign only"]["metrics"] == {}
    assert "no patient of class tumour" in metrics_table(result)


def test_one_class_in_all_patients_gives_no_fake_figures():
    models = [replace(m, labels=np.zeros(40, int)) for m in cohort()]
    result, curves = evaluate_classes(models, FEW)
    pooled = result["models"]["gated_abmil"]["scopes"]["pooled"]["metrics"]
    assert pooled["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no patient of class tumour among 40",
    }
    assert pooled["brier"]["value"] > 0
    assert curves["models"]["gated_abmil"]["roc"] is None
    assert result["verdict"][0]["code"] == "one_class"
    json.dumps(result, allow_nan=False)


def test_more_than_two_classes(result):
    result, curves = evaluate_classes(cohort(n=45, classes=("a", "b", "c")), FEW)
    p = cohort(n=45, classes=("a", "b", "c"))[0]
    expected = np.mean([roc_auc_score(p.labels, prob, multi_class="ovr") for prob in p.prob])
    scope = result["models"]["gated_abmil"]["scopes"]["pooled"]
    assert scope["metrics"]["auroc"]["value"] == pytest.approx(expected)
    assert scope["positives"] is None
    assert set(curves["models"]["gated_abmil"]["classes"]) == {"a", "b", "c"}


def test_label_that_follows_the_site_raises_the_alarm():
    models = cohort(by_site=0.8)
    at_site = np.array([1.0 if s == "B" else 0.0 for s in models[0].sites])
    prob = 0.3 + 0.4 * np.repeat(at_site[None], 3, 0)
    site_model = replace(models[2], prob=np.stack([1 - prob, prob], -1))
    shortcut = replace(site_model, name="gated_abmil", prob=site_model.prob + np.array([[[-1e-3, 1e-3]]]))
    result, _ = evaluate_classes([shortcut, models[1], site_model, models[3]], FEW)
    codes = {finding["code"] for finding in result["verdict"]}
    assert {"site_predicts_label", "not_better", "between_sites"} <= codes


def test_cramers_v_by_hand():
    assert association_test(np.array([0, 0, 1, 1]), ["A", "A", "B", "B"], 0)["cramers_v"] == pytest.approx(1)
    balanced = association_test(np.array([0, 1, 0, 1]), ["A", "A", "B", "B"], 0)
    assert (balanced["cramers_v"], balanced["p"]) == (0, 1)
    assert association_test(np.array([0, 1]), ["A", "A"], 0) is None


def test_models_with_other_patients_are_not_compared():
    other = replace(simulate("mean_pool_lr", 0.5, seed=1), patients=tuple(f"Q{i:03d}" for i in range(40)))
    result, _ = evaluate_classes([cohort()[0], other], FEW)
    [pair] = [c for c in result["comparisons"] if (c["model"], c["reference"]) == ("gated_abmil", "mean_pool_lr")]
    assert pair["reason"] == "the two models saw different patients"


def test_repeats_that_miss_patients_are_averaged_over_what_they_have():
    models = cohort()
    prob, predicted, fold = (np.array(a, copy=True) for a in (models[0].prob, models[0].predicted, models[0].fold))
    prob[2, :10], predicted[2, :10], fold[2, :10] = np.nan, -1, -1
    p = replace(models[0], prob=prob, predicted=predicted, fold=fold)
    result, _ = evaluate_classes([p, *models[1:]], FEW)
    parts = [roc_auc_score(p.labels, prob[r, :, 1]) for r in (0, 1)] + [roc_auc_score(p.labels[10:], prob[2, 10:, 1])]
    scopes = result["models"]["gated_abmil"]["scopes"]
    assert scopes["pooled"]["metrics"]["auroc"]["value"] == pytest.approx(np.mean(parts))
    assert scopes["repeat:2"]["n"] == 30


def test_bins_shrink_with_the_sample():
    assert [bins_for(n, 15) for n in (3, 24, 75, 1000)] == [2, 4, 15, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**rows[0], "label": "unknown"}, *rows[1:]], "row 2 .*has no column prob_unknown"),
        (lambda rows: [*rows, rows[0]], "tested twice in repeat 0"),
        (lambda rows: [{**rows[0], "prob_tumour": "nan"}, *rows[1:]], "row 2 .*prob_tumour is nan"),
        (lambda rows: [{**rows[0], "prob_tumour": "x"}, *rows[1:]], "row 2 .*prob_tumour is 'x', not a number"),
        (lambda rows: [{**rows[0], "prob_tumour": "0.99999"}, *rows[1:]], "do not sum to 1"),
        (lambda rows: [{**row, "site": row["repeat"]} for row in rows], "another label or site"),
        (lambda rows: [], "no predictions"),
        (
            lambda rows: [{k: v for k, v in row.items() if k != "fold"} for row in rows],
            "columns missing for a binary task: fold",
        ),
    ],
)
def test_broken_predictions_stop_with_the_row(tmp_path, change, message):
    path = write(simulate("m", 1.0, n=12), tmp_path / "p.csv")
    with path.open() as handle:
        reader = csv.DictReader(handle)
        columns, rows = reader.fieldnames, list(reader)
    rows = change(rows)
    with path.open("w", newline="") as handle:
        out = csv.DictWriter(handle, list(rows[0]) if rows else columns)
        out.writeheader()
        out.writerows(rows)
    with pytest.raises(RunError, match=message):
        read_predictions(path, "m", "binary")


def test_no_models_and_other_classes_stop():
    with pytest.raises(RunError, match="no predictions to evaluate"):
        evaluate_classes([])
    with pytest.raises(RunError, match="different things"):
        evaluate_classes([cohort()[0], simulate("other", 1.0, classes=("x", "y"))])


def test_encoder_that_has_seen_the_cohort_is_named():
    result, _ = evaluate_classes(cohort(), FEW, {"phikon": ["TCGA"]})
    [said] = [finding["text"] for finding in result["verdict"] if finding["code"] == "contaminated"]
    assert said.startswith("Encoder phikon was pretrained on TCGA")


def test_a_model_that_knows_only_how_common_classes_are_is_at_chance():
    """Five folds of 60 patients, twelve positive: probabilities are the prevalence of the other folds. Their pooled
    AUROC is far below 0.5 by construction; what patients are ranked by is the same for all. Within a fold the order
    stays, and a single tested fold is left as it is."""
    rng = np.random.default_rng(0)
    labels = np.array([1] * 12 + [0] * 48)
    fold = np.stack([np.r_[np.arange(12) % 5, np.arange(48) % 5], np.r_[np.arange(12) % 2, np.arange(48) % 3]])
    share = np.array([[(labels[of != k] == 1).mean() for k in of] for of in fold])
    prob = np.stack([1 - share, share], -1)
    assert auroc(prob[0, :, 1], labels == 1) < 0.46  # dealt evenly, but 12 is no multiple of 5
    assert auroc(prob[1, :, 1], labels == 1) < 0.4
    ranks = without_prevalence(prob, labels, fold)
    np.testing.assert_allclose(ranks, 0.5)
    own = rng.uniform(0.01, 0.99, (2, 60))
    ranks = without_prevalence(np.stack([1 - own, own], -1), labels, fold)
    assert np.allclose(ranks.sum(-1), 1)
    for r in range(2):
        for k in range(2):
            inside = fold[r] == k
            assert (ranks[r, inside, 1].argsort() == own[r, inside].argsort()).all()
    one = np.zeros_like(fold)
    np.testing.assert_array_equal(without_prevalence(prob, labels, one), prob)
