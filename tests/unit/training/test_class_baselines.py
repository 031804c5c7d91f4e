"""Baselines: mean-pool + logistic regression against scikit-learn, and the site alone."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from mil_cohort import planted
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from slidemake.mil.aggregators import predict_bag
from slidemake.splits.make import Splits
from slidemake.training.class_baselines import (
    C_GRID,
    as_aggregator,
    fit_mean_pool_lr,
    predict_site,
    site_prevalence,
    site_threshold,
)
from slidemake.training.plan import member_plan
from slidemake.training.train import train_model

TASK = {"label": "label"}


@pytest.mark.parametrize("classes", [2, 3])
def test_mean_pool_lr_is_sklearns_pipeline(classes):
    bags, splits = planted(n=30, mean_shift=0.7)
    people = sorted(splits.labels)
    labels = {p: i % classes for i, p in enumerate(people)}
    plan = member_plan(people[:20], [], labels, 0.25, 0)
    fitted = fit_mean_pool_lr(bags, labels, people[:20], plan, classes)
    assert fitted.c in C_GRID
    x = np.stack([bags.bag(p).mean(0, dtype=np.float64) for p in people])
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=fitted.c, class_weight="balanced", max_iter=2000))
    oracle.fit(x[:20], [labels[p] for p in people[:20]])
    expected = oracle.predict_proba(x[20:])
    model = as_aggregator(fitted, classes)
    for patient, prob in zip(people[20:], expected, strict=True):
        logits, attention = predict_bag(model, bags.bag(patient))
        got = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(got, prob, atol=1e-5)
        np.testing.assert_allclose(attention, 1 / len(attention))
    assert set(fitted.val_logits) == set(people[:20])


def test_scaler_sees_training_patients_only():
    bags, splits = planted(mean_shift=0.7)
    people = sorted(splits.labels)
    labels = {p: i % 2 for i, p in enumerate(people)}
    fitted = fit_mean_pool_lr(bags, labels, people[:12], member_plan(people[:12], [], labels, 0.25, 0), 2)
    x = np.stack([bags.bag(p).mean(0, dtype=np.float64) for p in people[:12]])
    np.testing.assert_allclose(fitted.scaler.mean_, x.mean(0))
    np.testing.assert_allclose(fitted.scaler.scale_, x.std(0))


def test_mean_pool_lr_through_training(tmp_path):
    bags, splits = planted(mean_shift=1.0)
    record = train_model(TASK, {"control": "mean_pool_lr"}, bags, splits, tmp_path)
    with open(tmp_path / "predictions_patients.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert roc_auc_score([r["label"] == "Y" for r in rows], [float(r["prob_Y"]) for r in rows]) > 0.9
    assert record["kind"] == "mean_pool_lr"
    assert (tmp_path / "bundle/weights.safetensors").exists()
    assert (tmp_path / "curves.csv").read_text() == "repeat,fold,epoch,train_loss,val_loss,val_auroc\n"


def test_site_prevalence_by_hand():
    labels = {"a": 1, "b": 1, "c": 0, "d": 0, "e": 0}
    sites = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}
    table, overall = site_prevalence(labels, sites, sorted(labels), 2)
    np.testing.assert_allclose(overall, [0.6, 0.4])
    np.testing.assert_allclose(table["x"], [(1 + 0.6) / 4, (2 + 0.4) / 4])
    np.testing.assert_allclose(table["y"], [(2 + 0.6) / 3, 0.4 / 3])
    np.testing.assert_allclose(predict_site(table, overall, "unseen"), overall)
    assert site_threshold(overall) == pytest.approx(0.4)
    assert site_threshold(np.ones(3) / 3) is None


def test_site_only_finds_a_confounded_site(tmp_path):
    bags, splits = planted()
    sites = {p: ("north" if name == "Y" else "south") for p, name in splits.labels.items()}
    sites["P00"] = "north"  # not a perfect one
    told = Splits(splits.folds, splits.labels, sites, splits.report)
    record = train_model(TASK, {"control": "site_only"}, bags, told, tmp_path)
    with open(tmp_path / "predictions_patients.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert roc_auc_score([r["label"] == "Y" for r in rows], [float(r["prob_Y"]) for r in rows]) > 0.9
    assert np.mean([r["predicted"] == r["label"] for r in rows]) > 0.9
    assert not (tmp_path / "bundle").exists()
    assert len(record["folds"]) == 6
