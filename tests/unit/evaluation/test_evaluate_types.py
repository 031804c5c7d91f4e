"""Evaluation of numbers, grades, several labels and survival: figures, controls, verdict, and bad input."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from lifelines.utils import concordance_index
from simulated import evaluate_classes
from simulated_outcomes import NAMES, table, truth_of, values_of, written
from sklearn.metrics import r2_score, roc_auc_score
from slidemake.core.failures import RunError
from slidemake.evaluation.evaluate import evaluate, evaluate_tables
from slidemake.evaluation.files import FIGURES
from slidemake.report.page import template_environment
from slidemake.report.task import measured_section
from slidemake.statistics.bootstrap import bootstrap_weights, percentile_interval
from slidemake.statistics.survival_metrics import metrics_over
from slidemake.tasks.class_predictions import ClassPredictions
from slidemake.tasks.prediction_table import read_predictions

QUICK = {"bootstrap": 200, "seed": 0}


def with_validation(made, n=30):
    """The table with n validation patients of every fold, predicted as its own are."""
    other = table(made.outcome.kind, n=n, seed=9)
    of_validation = other.values[0], other.truth
    return replace(made, validation={(r, f): of_validation for r in made.repeats for f in range(3)})


def check_no_nan(result, curves):
    text = json.dumps([result, curves], allow_nan=False)  # raises for NaN
    assert "NaN" not in text


def figures(result, model="m", scope="pooled"):
    return {k: m["value"] for k, m in result["models"][model]["scopes"][scope]["metrics"].items()}


@pytest.mark.parametrize("kind", list(NAMES))
def test_figures_intervals_and_controls(kind):
    good, bad = table(kind), table(kind, "mean_pool_lr", noise=1.5)
    result, curves = evaluate_tables([good, bad], QUICK)
    check_no_nan(result, curves)
    primary = result["primary"]
    pooled = result["models"]["m"]["scopes"]["pooled"]["metrics"]
    assert pooled[primary]["low"] < pooled[primary]["value"] < pooled[primary]["high"]
    assert pooled[primary]["value"] == pytest.approx(
        np.mean([figures(result, scope=f"repeat:{r}")[primary] for r in range(2)])
    )
    assert any(line["code"] == "better_than_controls" for line in result["verdict"])
    null = figures(result, {"regression": "mean", "survival": "kaplan_meier"}.get(kind, "prevalence"))
    assert null[primary] == pytest.approx(result["chance"], abs=1e-9)
    assert set(result["models"]["m"]["spread"]) == {"repeats", "folds"}
    assert {"site:s0", "fold:0/0", "fold:1/2", "ensemble"} <= set(result["models"]["m"]["scopes"])


def test_pooled_figures_are_those_of_the_libraries():
    one = table("regression", repeats=1)
    assert figures(evaluate_tables([one], QUICK)[0])["r2"] == pytest.approx(
        r2_score(one.truth[:, 0], one.values[0, :, 0])
    )
    one = table("survival", repeats=1)
    found = figures(evaluate_tables([one], QUICK)[0])
    (time, event), risk = one.truth.T, one.values[0, :, 0]
    folds = [np.flatnonzero(one.fold[0] == f) for f in range(3)]  # patients of one fold are compared
    pairs = [sum(event[i] and time[i] < time[j] for i in f for j in f) for f in folds]
    inside = [concordance_index(time[f], -risk[f], event[f]) for f in folds]
    assert found["c_index"] == pytest.approx(np.average(inside, weights=pairs))
    one = table("multilabel", repeats=1)
    found = figures(evaluate_tables([one], QUICK)[0])
    areas = []
    for k, name in enumerate(one.names):
        known = one.truth[:, k] >= 0
        areas.append(roc_auc_score(one.truth[known, k], one.values[0, known, k]))
        assert found[f"auroc:{name}"] == pytest.approx(areas[-1])
    assert found["auroc"] == pytest.approx(np.mean(areas))


def test_the_bootstrap_covers_the_truth():
    """95 % intervals of the C-index of uninformative predictions hold 0.5 in 84 of 100 cohorts or more (3 sd)."""
    inside = 0
    for seed in range(100):
        truth, _ = truth_of("survival", 40, np.random.default_rng(seed))
        noise = np.random.default_rng([seed, 9]).random(40)
        values, _ = values_of("survival", noise)
        weights = bootstrap_weights(truth[:, 1].astype(int), 200, seed)[0]
        drawn = metrics_over(truth[:, 0], truth[:, 1] == 1, values[:, 0], values[:, 1:], (2.0, 4.0, 8.0), weights)
        low, high = percentile_interval(drawn["c_index"])
        inside += low <= 0.5 <= high
    assert inside >= 84


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("case", ["constant", "three", "one_site", "one_label"])
def test_bad_input_gives_numbers_or_reasons(kind, case, tmp_path):
    made = table(kind, n=3 if case == "three" else 24, constant=case == "constant", repeats=1)
    if case == "one_site":
        made = replace(made, sites=("s0",) * 24)
    if case == "one_label":  # all censored, one grade, one value, one class of each label
        made.truth[:] = made.truth[0]
        made.truth[:, -1] = 0 if kind == "survival" else made.truth[0, -1]
    result, curves = evaluate_tables([made], QUICK)
    check_no_nan(result, curves)
    for entry in result["models"].values():
        for scope in entry["scopes"].values():
            for m in scope["metrics"].values():
                assert (m["value"] is None) == (m["reason"] is not None)
                assert m["reason"] is None or m["reason"].startswith("not defined, because ")
    assert result["verdict"]
    section = measured_section(tmp_path, result, curves, {}, "m")
    assert len(section["pictures"]) >= 1
    if case == "one_label" and kind == "survival":
        reasons = {line["code"]: line["text"] for line in result["verdict"]}
        assert "all 24 patients are censored" in reasons["undefined"]
    if case == "constant" and kind == "regression":
        assert "correlation is not defined, because all predictions are the same" in " ".join(section["undefined"])


@pytest.mark.parametrize("kind", list(NAMES))
def test_models_are_compared_in_pairs_with_holm(kind):
    made = [table(kind), table(kind, "other", noise=0.6), table(kind, "mean_pool_lr", noise=1.5)]
    result, curves = evaluate_tables(made, QUICK)
    check_no_nan(result, curves)
    found = {(c["model"], c["reference"]): c for c in result["comparisons"]}
    null = {"regression": "mean", "survival": "kaplan_meier"}.get(kind, "prevalence")
    rivals = [("m", "other"), ("m", "mean_pool_lr"), ("other", "mean_pool_lr")]
    assert next(iter(found)) == ("m", "other")
    assert set(rivals) < set(found)
    assert found["m", null]["p_holm"] is None  # being better than nothing claims nothing
    raw = sorted(found[pair]["metrics"][result["primary"]]["p"] for pair in rivals)
    corrected = sorted(found[pair]["p_holm"] for pair in rivals)
    steps = [min(1, p * k) for p, k in zip(raw, (3, 2, 1), strict=True)]  # Holm 1979, by hand
    assert corrected == pytest.approx(np.maximum.accumulate(steps))
    about = {line["text"].split(":")[0]: line["text"] for line in result["verdict"] if "difference" in line["text"]}
    assert "The best control, other," not in about["m"]  # it is the best of the others, but no control
    assert found["m", "other"]["p_holm"] < 0.05
    assert found["m", "other"]["metrics"][result["primary"]]["difference"] > 0


@pytest.mark.parametrize("kind", list(NAMES))
def test_subgroups_and_the_gap_between_them(kind):
    """The scanner B adds noise to what the model says of every second patient."""
    made = table(kind, n=160)
    spoilt = table(kind, n=160, noise=3.0)
    on_b = np.arange(160) % 2 == 1
    said = {
        key: np.where(on_b[None, :, None], getattr(spoilt, key), getattr(made, key)) for key in ("values", "decisions")
    }
    made = replace(made, **said)
    scanner = {p: "B" if b else "A" for p, b in zip(made.patients, on_b, strict=True)}
    of_age = {p: "few" if i < 6 else "others" for i, p in enumerate(made.patients)}
    result, curves = evaluate_tables([made], QUICK, groups={"scanner": scanner, "age": of_age})
    check_no_nan(result, curves)
    subgroups, primary = result["models"]["m"]["subgroups"], result["primary"]
    alone = replace(
        made,
        **{key: tuple(np.array(getattr(made, key))[on_b]) for key in ("patients", "sites")},
        truth=made.truth[on_b],
        **{key: getattr(made, key)[:, on_b] for key in ("values", "decisions", "fold")},
    )
    expected = figures(evaluate_tables([alone], QUICK)[0])[primary]
    assert subgroups["scanner"]["groups"]["B"]["metrics"][primary]["value"] == pytest.approx(expected)
    gap = subgroups["scanner"]["gaps"][primary]
    assert (gap["worst"], gap["best"]) == ("B", "A")
    assert gap["gap"]["low"] > 0
    assert gap["gap"]["value"] > gap["gap_by_chance"]
    assert gap["p"] < 0.05
    assert subgroups["age"]["groups"]["few"]["reason"] == "6 patients; 20 are needed"
    assert subgroups["age"]["gaps"] == {}
    assert any(line["code"] == "subgroup_gap" and "scanner" in line["text"] for line in result["verdict"])
    assert "subgroups" not in result["models"]["m"]["scopes"]


def test_probabilities_of_grades_are_calibrated_and_abstain():
    made = with_validation(table("ordinal", n=150), 150)
    entry = evaluate_tables([made], QUICK)[0]["models"]["m"]
    mean, truth = made.values.mean(0), made.truth[:, 0].astype(int)
    onehot = np.eye(3)[truth]
    found = entry["calibration"]
    assert found["brier"] == pytest.approx(((mean - onehot) ** 2).sum(1).mean())
    # by hand: mean gap of confidence and accuracy over bins of equal mass of the most probable grade
    order = np.argsort(mean.max(1), kind="stable")
    gap = (mean.max(1) - (mean.argmax(1) == truth))[order]
    assert found["ece"] == pytest.approx(sum(abs(b.sum()) for b in np.array_split(gap, found["bins"])) / 150)
    each = []
    for c in range(3):  # the same of every grade's own probability
        order = np.argsort(mean[:, c], kind="stable")
        gap = (mean[:, c] - onehot[:, c])[order]
        each.append(sum(abs(b.sum()) for b in np.array_split(gap, found["bins"])) / 150)
    assert found["ece_classwise"] == pytest.approx(np.mean(each))
    assert found["before"] is None
    assert set(found["sites"]) == {"s0", "s1", "s2"}
    sets = entry["conformal"]
    assert sets["validation"] == {"least": 150, "most": 150}
    # 90 % promised; sd of the coverage over 150 validation and 150 tested patients 0.035, of which 3
    assert abs(sets["pooled"]["coverage"]["value"] - 0.9) < 0.105
    assert set(sets["by_class"]) == {"a", "b", "c"}
    assert entry["abstention"]["aurc"] < 0.5
    assert evaluate_tables([table("ordinal")], QUICK)[0]["models"]["m"]["conformal"] is None


def test_every_label_is_calibrated_as_a_task_of_two_classes():
    """What a multi-label task says of a label is what a binary task with the same predictions says."""
    made = with_validation(table("multilabel", n=150), 150)
    inside = np.clip(made.values, 1e-6, 1 - 1e-6)
    raw = 2 * (np.log(inside) - np.log1p(-inside))  # the temperature was 2
    labels = evaluate_tables([replace(made, raw=raw)], QUICK)[0]["models"]["m"]["labels"]
    assert list(labels) == ["er", "pr"]
    for k, name in enumerate(made.names):
        known = np.flatnonzero(made.truth[:, k] >= 0)
        assert (len(known) < 150) == (name == "er")
        values, truth = next(iter(made.validation.values()))
        told = truth[:, k] >= 0
        two = np.stack([1 - made.values[:, known, k], made.values[:, known, k]], -1)
        binary = ClassPredictions(
            name="m",
            classes=("no", "yes"),
            patients=tuple(made.patients[i] for i in known),
            sites=tuple(made.sites[i] for i in known),
            labels=made.truth[known, k].astype(int),
            repeats=made.repeats,
            prob=two,
            predicted=made.decisions[:, known, k].astype(int),
            fold=made.fold[:, known],
            logits=np.stack([-raw[:, known, k] / 2, raw[:, known, k] / 2], -1),
            validation={
                at: (np.stack([1 - values[told, k], values[told, k]], -1), truth[told, k].astype(int))
                for at in made.validation
            },
        )
        expected = evaluate_classes([binary], QUICK)[0]["models"]["m"]
        assert labels[name]["calibration"]["before"]["ece"] == pytest.approx(expected["calibration"]["before"]["ece"])
        assert labels[name]["calibration"]["n"] == len(known)
        for key in ("ece", "brier", "slope", "table", "ece_if_calibrated"):
            assert labels[name]["calibration"][key] == expected["calibration"][key], key
        assert labels[name]["abstention"] == expected["abstention"]
        for key in ("value", "low", "high"):
            pooled = [e["conformal"]["pooled"]["coverage"][key] for e in (labels[name], expected)]
            # the bootstrap of a multi-label task is not stratified: its interval is another one
            assert pooled[0] == pytest.approx(pooled[1], abs=0 if key == "value" else 0.05)


def test_logits_are_read_where_a_file_has_them(tmp_path):
    """Grades: the probabilities at a temperature of 1 come from the logits of the stages, by hand."""
    made = table("ordinal", n=30, repeats=1)
    written(tmp_path / "p.csv", "ordinal", made)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    for row in rows:
        row |= {"logit_a": "0.5", "logit_b": "-1.25"}
    with open(tmp_path / "p.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = evaluate_tables([read_predictions(tmp_path / "p.csv", "m", "ordinal")], QUICK)[0]["models"]["m"][
        "calibration"
    ]
    first, second = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(1.25))  # P(a), P(b | not a)
    prob = np.array([first, (1 - first) * second, (1 - first) * (1 - second)])
    onehot = np.eye(3)[made.truth[:, 0].astype(int)]
    assert found["before"]["brier"] == pytest.approx(((prob - onehot) ** 2).sum(1).mean())
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace(",0.5,", ",,", 1))
    assert read_predictions(tmp_path / "p.csv", "m", "ordinal").raw is None  # as of a model of the site alone
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace(",,", ",inf,", 1))
    with pytest.raises(RunError, match="finite number"):
        read_predictions(tmp_path / "p.csv", "m", "ordinal")


def test_the_verdict_names_labels_that_are_off():
    made = table("multilabel", n=200, noise=0.02)
    sharp = np.clip((made.values - 0.5) * 0.1 + 0.5, 0, 1)  # far too cautious
    only_er = np.stack([sharp[..., 0], made.truth[None, :, 1].repeat(2, 0) * 0.98 + 0.01], -1)
    verdict = evaluate_tables([replace(made, values=only_er)], QUICK)[0]["verdict"]
    [said] = [line for line in verdict if line["code"] in ("calibration", "miscalibrated")]
    assert (said["level"], said["code"]) == ("warning", "miscalibrated")
    assert said["text"].startswith("m, er: calibration error (ECE) 0.")


def test_groups_with_few_events_have_no_figures():
    made = table("survival", n=100)
    made.truth[:50, 1] = np.arange(50) < 2
    values = {p: "quiet" if i < 50 else "usual" for i, p in enumerate(made.patients)}
    found = evaluate_tables([made], QUICK, groups={"stain": values})[0]["models"]["m"]["subgroups"]["stain"]["groups"]
    assert found["quiet"]["reason"] == "2 with the event; 5 are needed"
    assert found["usual"]["reason"] is None


def test_high_and_low_risk_are_compared():
    result, curves = evaluate_tables([table("survival", n=100)], QUICK)
    groups = curves["models"]["m"]["groups"]
    assert groups["high"]["n"] + groups["low"]["n"] == 100
    assert result["models"]["m"]["log_rank"]["p"] < 0.05
    assert result["models"]["m"]["log_rank"]["hazard_ratio"] > 1
    assert len(result["models"]["m"]["log_rank_by_repeat"]) == 2
    assert "kaplan_meier" in result["models"]


@pytest.mark.parametrize("kind", list(NAMES))
def test_files(kind, tmp_path):
    made = table(kind, n=20)
    written(tmp_path / "p.csv", kind, made)
    read = read_predictions(tmp_path / "p.csv", "m", kind)
    np.testing.assert_array_equal(read.truth, made.truth)
    np.testing.assert_array_equal(read.values, made.values)
    np.testing.assert_array_equal(read.decisions, made.decisions)
    paths = {name: tmp_path / name for name in ("metrics", "table", "curves")}
    evaluate([tmp_path / "p.csv"], ["m"], kind, QUICK, **paths)
    rows = list(csv.reader(io.StringIO(paths["table"].read_text())))
    assert tuple(rows[0]) == (*FIGURES, "reason")
    assert not any(cell.lower() in ("nan", "inf") for row in rows for cell in row)


def test_tables_that_are_none(tmp_path):
    made = table("regression", n=4)
    written(tmp_path / "p.csv", "regression", made)
    text = (tmp_path / "p.csv").read_text()
    (tmp_path / "bad.csv").write_text(text.replace("P001,s1,", "P001,s1,x", 1))
    with pytest.raises(RunError, match=r"row 3 .patient P001.: not a prediction of a regression task"):
        read_predictions(tmp_path / "bad.csv", "m", "regression")
    with pytest.raises(RunError, match=r"columns missing for a survival task: .*risk"):
        read_predictions(tmp_path / "p.csv", "m", "survival")
    doubled = text + text.splitlines()[1] + "\n"
    (tmp_path / "twice.csv").write_text(doubled)
    with pytest.raises(RunError, match="tested twice"):
        read_predictions(tmp_path / "twice.csv", "m", "regression")
    with pytest.raises(RunError, match="no predictions to evaluate"):
        evaluate_tables([])


@pytest.mark.parametrize("kind", list(NAMES))
def test_the_page_shows_comparisons_subgroups_and_intervals(kind, tmp_path):
    made = [table(kind, n=80), table(kind, "mean_pool_lr", n=80, noise=1.0)]
    scanner = {p: "AB"[i % 2] for i, p in enumerate(made[0].patients)}
    made[0] = with_validation(made[0])
    result, curves = evaluate_tables(made, QUICK, groups={"scanner": scanner})
    section = measured_section(tmp_path, result, curves, {}, "m")
    page = template_environment().get_template("report_evaluation.html.j2").render(task={**section, "metrics": result})
    assert "Is one model better than another?" in page
    assert "DeLong" not in page
    assert "By subgroup (m)" in page
    assert "gap by chance" in page
    assert ("truth is in the interval" in page) == (kind == "regression")
    assert ("Calibration (m)" in page) == (kind in ("ordinal", "survival"))
    assert ("Calibration (er)" in page) == ("Calibration (pr)" in page) == (kind == "multilabel")
    assert ("seen / expected" in page) == (kind == "survival")
    assert ("truth is in the set" in page) == (kind in ("ordinal", "multilabel"))
    assert "Before:" not in page  # the tables have no logits
    assert "prevalence" not in page
