"""Training over folds: signal found, nothing found in noise, determinism, resume, calibration."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from mil_cohort import QUICK, planted
from sklearn.metrics import roc_auc_score
from slidemake.core.failures import RunError
from slidemake.core.files import read_json
from slidemake.mil.bags import make_bags
from slidemake.mil.bundle import load_bundle
from slidemake.mil.fitting import DEFAULTS, fit_member, sample_batch
from slidemake.mil.losses import class_objective, class_weights
from slidemake.mil.scaling import feature_statistics
from slidemake.splits.make import Splits
from slidemake.statistics.temperature import auroc, fit_intercepts, fit_temperature, probabilities, youden_threshold
from slidemake.tasks.classes import class_order
from slidemake.training.plan import member_plan
from slidemake.training.train import train_model

TASK = {"label": "label"}
FILES = ("predictions_slides.csv", "predictions_patients.csv", "curves.csv")


def rows_of(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def area(path):
    rows = rows_of(path)
    return roc_auc_score([r["label"] == "Y" for r in rows], [float(r["prob_Y"]) for r in rows])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    bags, splits = planted()
    return out, bags, splits, train_model(TASK, QUICK, bags, splits, out, {"tissue": {"close_um": 1}})


def test_planted_signal_is_found(trained):
    out, _, splits, record = trained
    rows = rows_of(out / "predictions_patients.csv")
    assert area(out / "predictions_patients.csv") > 0.9
    assert len(rows) == 2 * 24
    assert {(int(r["repeat"]), r["patient_id"]): r["fold"] for r in rows} == {
        (r, p): f for r, of in splits.folds.items() for p, f in of.items()
    }
    for row in rows:
        assert float(row["prob_N"]) + float(row["prob_Y"]) == pytest.approx(1, abs=1e-6)
        assert row["predicted"] == ("Y" if float(row["prob_Y"]) >= float(row["threshold"]) else "N")
    assert np.mean([r["predicted"] == r["label"] for r in rows]) > 0.8
    assert len(rows_of(out / "predictions_slides.csv")) == 2 * sum(1 + i % 3 for i in range(24))
    assert read_json(out / "train.json") == json.loads(json.dumps(record))


def test_calibrated_probabilities_are_the_logits_over_temperature_and_shifted(trained):
    out, _, _, record = trained
    link = {(f["repeat"], f["fold"]): (f["temperature"], f["intercept"]) for f in record["folds"]}
    for row in rows_of(out / "predictions_patients.csv"):
        logits = np.array([float(row["logit_N"]), float(row["logit_Y"])])
        prob = probabilities(logits, *link[int(row["repeat"]), row["fold"]])
        assert float(row["prob_Y"]) == pytest.approx(prob[1], abs=1e-6)


def test_no_patient_is_on_two_sides(trained):
    out, _, splits, record = trained
    for fold in record["folds"]:
        info = json.loads((out / "bundles" / f"repeat{fold['repeat']}_fold{fold['fold']}" / "bundle.json").read_text())
        test = set(splits.parts(fold["repeat"], fold["fold"])[2])
        training = info["training"]
        held_out = []
        for member in training["members"]:
            assert not set(member["train"]) & set(member["val"])
            assert not (set(member["train"]) | set(member["val"])) & test
            held_out += member["val"]
        assert sorted(held_out) == sorted(training["train"])  # every one predicted once by a member that did not see it
        assert set(training["validation_probability"]) == set(training["train"])


def test_same_bytes_again_and_on_threads(trained, tmp_path):
    out, bags, splits, record = trained
    torch.rand(3)  # whatever the global generator did before
    again = train_model(TASK, QUICK, bags, splits, tmp_path, {"tissue": {"close_um": 1}}, threads=3)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert again["fingerprint"] == record["fingerprint"]
    weights = "bundle/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (out / weights).read_bytes()


def test_resume_trains_only_what_is_missing(trained, tmp_path):
    source, bags, splits, _ = trained
    out = tmp_path / "copy"
    shutil.copytree(source, out)
    before = {
        p.name: (out / "bundles" / p.name / "bundle.json").stat().st_mtime_ns for p in (out / "bundles").iterdir()
    }
    (out / "train.json").unlink()
    shutil.rmtree(out / "bundles" / "repeat1_fold2")
    (out / "bundles" / "repeat0_fold9").mkdir()  # of an older split
    record = train_model(TASK, QUICK, bags, splits, out, {"tissue": {"close_um": 1}})
    assert [(f["repeat"], f["fold"]) for f in record["folds"] if not f["reused"]] == [(1, "2")]
    for name in FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in (out / "bundles").iterdir()) == sorted(before)
    after = {name: (out / "bundles" / name / "bundle.json").stat().st_mtime_ns for name in before}
    assert [name for name in before if before[name] != after[name]] == ["repeat1_fold2"]
    changed = train_model(TASK, {**QUICK, "epochs": 9}, bags, splits, out, {"tissue": {"close_um": 1}})
    assert not any(f["reused"] for f in changed["folds"])


def test_shuffled_labels_are_at_chance(tmp_path):
    bags, both = planted(n=32)
    splits = Splits({0: both.folds[0]}, both.labels, both.sites, both.report)
    areas = []
    for seed in range(4):
        options = {**QUICK, "seed": seed, "epochs": 8, "control": "shuffled_label"}
        train_model(TASK, options, bags, splits, tmp_path / str(seed))
        areas.append(area(tmp_path / str(seed) / "predictions_patients.csv"))
    assert 0.38 < np.mean(areas) < 0.62


def test_curves_are_one_row_an_epoch(trained):
    rows = rows_of(trained[0] / "curves.csv")
    assert list(rows[0]) == ["repeat", "fold", "epoch", "train_loss", "val_loss", "val_auroc"]
    first = [int(r["epoch"]) for r in rows if (r["repeat"], r["fold"]) == ("0", "0")]
    assert first == list(range(1, len(first) + 1))
    assert QUICK["min_epochs"] <= len(first) <= QUICK["epochs"]


def test_epochs_that_may_not_be_kept_are_validated_on_fewer_tiles(monkeypatch):
    """Which changes what is drawn of them, and nothing of the model or of the epochs that count."""
    bags, splits = planted()
    labels = {p: int(label == "Y") for p, label in splits.labels.items()}
    names, settings = sorted(labels), {**DEFAULTS, **QUICK}
    made = []
    for tiles in (256, 1):
        monkeypatch.setattr("slidemake.mil.fitting.EARLY_TILES", tiles)
        objective = class_objective(labels, names[:16], 2, settings)
        made.append(fit_member(bags, objective, names[:16], names[16:], settings, 0))
    whole, few = made
    early = settings["min_epochs"] - 1
    assert [e["train_loss"] for e in whole.curve] == [e["train_loss"] for e in few.curve]
    assert whole.curve[early:] == few.curve[early:]
    assert all(a["val_loss"] != b["val_loss"] for a, b in zip(whole.curve[:early], few.curve[:early], strict=True))
    assert whole.epoch == few.epoch
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, few.model.state_dict()[key])


def test_patients_without_tiles_and_bags_of_one_tile(tmp_path):
    bags, splits = planted()
    sizes = np.diff(bags.offsets)
    keep = np.ones(len(bags.features), bool)
    for i, patient in enumerate(bags.patients):
        start, size = bags.offsets[i], sizes[i]
        if patient == "P03":
            keep[start : start + size] = False
        elif patient in ("P00", "P09"):
            keep[start + 1 : start + size] = False
    new = [int(keep[bags.offsets[i] : bags.offsets[i + 1]].sum()) for i in range(len(sizes))]
    small = make_bags(bags.features[keep], bags.slides, bags.patients, new, bags.encoder, bags.stain)
    record = train_model(TASK, {**QUICK, "epochs": 8}, small, splits, tmp_path)
    rows = rows_of(tmp_path / "predictions_patients.csv")
    assert record["without_prediction"] == [{"patient_id": "P03", "reason": "no tiles"}]
    assert "P03" not in {r["patient_id"] for r in rows}
    assert next(r["tiles"] for r in rows if r["patient_id"] == "P00") == "1"


def test_three_classes_and_a_given_validation_set(tmp_path):
    bags, splits = planted(n=30, mean_shift=0.5)
    people = sorted(splits.labels)
    labels = {p: "abc"[i % 3] for i, p in enumerate(people)}
    folds = {p: ("train", "train", "val", "0", "train")[i // 3 % 5] for i, p in enumerate(people)}
    given = Splits({0: folds}, labels, splits.sites, {}, {"0": "test"})
    record = train_model(TASK, {**QUICK, "epochs": 8}, bags, given, tmp_path)
    rows = rows_of(tmp_path / "predictions_patients.csv")
    assert len(rows) == 6
    assert {k for k in rows[0] if k.startswith("prob_")} == {"prob_a", "prob_b", "prob_c"}
    assert rows[0]["threshold"] == ""
    assert record["folds"][0]["patients"] == {"train": 18, "val": 6, "test": 6}
    info = json.loads((tmp_path / "bundles/repeat0_fold0/bundle.json").read_text())
    assert len(info["training"]["validation_probability"]) == 6


def test_wrong_requests():
    bags, splits = planted()
    with pytest.raises(RunError, match="Unknown aggregator 'clam'"):
        train_model(TASK, {"aggregator": "clam"}, bags, splits, "unused")
    with pytest.raises(RunError, match="positive class 'X'"):
        train_model({"label": "label", "positive": "X"}, {}, bags, splits, "unused")
    one = Splits(splits.folds, dict.fromkeys(splits.labels, "N"), splits.sites, {})
    with pytest.raises(RunError, match="all 16 patients have the same class, N"):
        train_model(TASK, {}, bags, one, "unused")


def test_positive_class_comes_second():
    assert class_order({"p": "a", "q": "b"}) == ("a", "b")
    assert class_order({"p": "a", "q": "b"}, "a") == ("b", "a")


def test_inner_folds_are_stratified_and_shrink_with_the_rarest_class():
    labels = {f"p{i:02d}": i % 2 for i in range(19)}
    plan = member_plan(sorted(labels), [], labels, 0.25, 0)
    assert len(plan) == 4
    assert all({labels[p] for p in val} == {0, 1} for _, val in plan)
    rare = {f"p{i}": int(i < 2) for i in range(10)}
    assert len(member_plan(sorted(rare), [], rare, 0.25, 0)) == 2
    lone = {f"p{i}": int(i < 1) for i in range(10)}
    assert member_plan(sorted(lone), [], lone, 0.25, 0) == [(sorted(lone), [])]


def test_fewer_members_are_the_first_of_all():
    half = {f"p{i:03d}": i % 2 for i in range(160)}
    whole = member_plan(sorted(half), [], half, 0.25, 0)
    assert [len(val) for _, val in whole] == [40] * 4
    assert {p for _, val in whole for p in val} == set(half)
    for members in (1, 2, 4, 9):
        assert member_plan(sorted(half), [], half, 0.25, 0, members=members) == whole[:members]
    given = {"a": 0, "b": 1, "c": 0}
    assert member_plan(["a", "b"], ["c"], given, 0.25, 0) == [(["a", "b"], ["c"])] * 4
    assert len(member_plan(["a", "b"], ["c"], given, 0.25, 0, members=7)) == 7


@pytest.mark.parametrize("control", [None, "mean_pool_lr"])
def test_a_single_member_validates_on_its_share_alone(tmp_path, control):
    bags, splits = planted()
    train_model(TASK, {**QUICK, "members": 1, "control": control}, bags, splits, tmp_path)
    bundle = load_bundle(tmp_path / "bundles" / "repeat0_fold0")
    (member,) = bundle.info["training"]["members"]
    assert set(bundle.info["training"]["validation_probability"]) == set(member["val"])
    assert len(member["val"]) == len(bundle.info["training"]["train"]) // 4
    assert [len(group.members) for group in bundle.groups] == [1]


def test_a_class_with_one_patient_trains_without_validation():
    bags, splits = planted()
    labels = {p: int(p == "P01") for p in splits.labels}
    settings = {**DEFAULTS, **QUICK}
    fitted = fit_member(bags, class_objective(labels, sorted(labels), 2, settings), sorted(labels), [], settings, 0)
    assert fitted.epoch == (QUICK["epochs"] + QUICK["min_epochs"]) // 2
    assert fitted.curve[0]["val_loss"] is None


def test_feature_statistics_equal_numpy():
    bags, splits = planted()
    people = sorted(splits.labels)[:9]
    mean, std = feature_statistics(bags, people)
    tiles = np.concatenate([bags.bag(p) for p in people]).astype(np.float64)
    np.testing.assert_allclose(mean, tiles.mean(0), atol=1e-6)
    np.testing.assert_allclose(std, tiles.std(0), atol=1e-6)


def test_batches_take_real_tiles_without_repeats():
    bags, _ = planted()
    for most, people in ((6, ["P00", "P04", "P08"]), (12, ["P00", "P04", "P08"]), (12, ["P03"])):
        settings = {**DEFAULTS, "tile_fraction": 0.5, "min_tiles": 3, "max_tiles": most}
        wanted = [min(max(round(0.5 * bags.tiles(p)), 3), most, bags.tiles(p)) for p in people]
        x, mask, *_ = sample_batch(bags, people, settings, np.random.default_rng(0))
        assert x.shape == (len(people), max(wanted), bags.dim)
        assert (mask is None) == (len(set(wanted)) == 1)
        counts = [x.shape[1]] * len(people) if mask is None else mask.sum(1).tolist()
        assert counts == wanted
        for tiles, patient, count in zip(x.numpy(), people, counts, strict=True):
            drawn = {t.tobytes() for t in tiles[:count]}
            assert len(drawn) == count
            assert drawn <= {t.tobytes() for t in bags.bag(patient)}


def test_a_single_whole_bag_is_not_copied():
    bags, _ = planted()
    settings = {**DEFAULTS, "tile_fraction": 1.0, "max_tiles": None}
    x, mask, *_ = sample_batch(bags, ["P04"], settings, np.random.default_rng(0))
    assert mask is None
    assert np.shares_memory(x.numpy(), bags.features)
    np.testing.assert_array_equal(x[0].numpy(), bags.bag("P04"))


def test_class_weights():
    np.testing.assert_allclose(class_weights([0, 0, 0, 1], 2), [4 / 6, 2])


def test_temperature_of_doubled_logits_is_two():
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        logits = rng.normal(size=(20000, classes)) * 2
        labels = np.array([rng.choice(classes, p=p) for p in probabilities(logits)])
        shift = np.linspace(-1, 1, classes)
        for factor, moved in ((1, 0), (2, 0), (2, shift)):
            temperature, intercept = fit_temperature(logits * factor + moved, labels)
            assert temperature == pytest.approx(factor, rel=0.05)
            np.testing.assert_allclose(intercept, -np.asarray(moved) / factor * np.ones(classes), atol=0.08)


def test_intercepts_undo_what_weighting_classes_does():
    """Logits that are right for equal classes, at a prevalence of 10 %: b is the log-odds of the prevalence."""
    rng = np.random.default_rng(1)
    labels = (rng.random(20000) < 0.1).astype(int)
    score = rng.normal(size=20000) + 2 * labels - 1  # log-odds at equal classes: 2 score
    b = fit_intercepts(np.stack([-score, score], 1), labels)
    assert b.sum() == pytest.approx(0)
    assert b[1] - b[0] == pytest.approx(np.log(labels.mean() / (1 - labels.mean())), abs=0.06)
    for few in (
        [0] * 9 + [1],
        [0] * 5,
        [0, 0, 2, 2],
    ):  # means are the shares, a class without patients counts half of one
        logits = rng.normal(size=(len(few), 3)) * 8
        counts = np.maximum(np.bincount(few, minlength=3), 0.5)
        found = probabilities(logits, intercept=fit_intercepts(logits, np.array(few))).mean(0)
        np.testing.assert_allclose(found, counts / counts.sum(), atol=1e-6)


def test_temperature_of_few_separated_patients_stays_sane():
    logits = np.array([[2.0, -2.0]] * 9 + [[-2.0, 2.0]] * 10)
    found = fit_temperature(logits, np.array([0] * 9 + [1] * 10))
    assert 0.85 < probabilities(logits[:1], *found)[0, 0] < 0.95  # about (n + 1) / (n + 2)
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0)) == (1.0, [0.0, 0.0])
    assert fit_temperature(logits[:3], np.zeros(3)) == (1.0, [0.0, 0.0])


def test_youden_threshold_by_hand_and_by_brute_force():
    assert youden_threshold([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1]) == pytest.approx(0.45)
    assert youden_threshold([0.1, 0.6, 0.7, 0.9], [0, 1, 0, 1]) == pytest.approx(0.35)  # tied with 0.8: closer to 0.5
    assert youden_threshold([0.9, 0.1], [0, 1]) == 0.5
    assert youden_threshold([0.3, 0.3], [0, 1]) == 0.5
    assert youden_threshold([0.3, 0.4], [1, 1]) == 0.5
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, truth = rng.random(30).round(2), rng.random(30) < 0.4

        def gain(t, scores=scores, truth=truth):
            return (scores[truth] >= t).mean() - (scores[~truth] >= t).mean()

        best = max(gain(t) for t in np.linspace(0, 1, 1001))
        found = youden_threshold(scores, truth)
        if best > 1e-9:
            assert gain(found) == pytest.approx(best)
        else:
            assert found == 0.5


def test_auroc_equals_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores, truth = rng.random(25).round(1), np.arange(25) % 3 == 0
        assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    assert auroc([0.1, 0.2], [1, 1]) is None
