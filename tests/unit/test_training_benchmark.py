"""The cohorts that choose the default model are what they say they are; their figures against those of others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from lifelines.utils import concordance_index
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from slidemake.tasks.classes import ClassOutcome
from slidemake.tasks.ordinal import OrdinalOutcome
from slidemake.tasks.survival import CoxOutcome

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import classic_bags
import training

PATIENTS, REGIONS = 12, 30
ABOUT = {
    "patients": PATIENTS,
    "across": 9,
    "focus": (0.12, 0.12),
    "style": "mixed",
    "sites": 2,
    "width": 2 + 2 * REGIONS,
    "blend": 0.0,
    "positive": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features that tell what a tile is: 0 tumour, 1 its kind, then one for every source region."""
    out = tmp_path_factory.mktemp("tiles")
    rows, features = [], []
    for name, sick in ((training.BENIGN, 0), (training.TUMOUR, 1)):
        for region in range(REGIONS):
            own = np.zeros(ABOUT["width"])
            own[:2] = sick, 20 * sick * (region % 2)
            own[2 + sick * REGIONS + region] = 1
            rows += [{"label": name, "group": f"{name}{region}"}] * 3
            features += [own] * 3
    (out / "tiles.json").write_text(json.dumps({"rows": rows, "styles": ["plain", "dark"]}))
    for k in range(2):
        np.save(out / f"features{k}.npy", np.array(features, np.float16))
    return out


@pytest.fixture(params=list(training.TASKS))
def cohort(request, folder, monkeypatch):
    monkeypatch.setattr(training, "settings_of", lambda number: dict(ABOUT))
    bags, splits, _ = training.compose(folder, 3, request.param)
    tiles = [bags.bag(f"P{i:03d}") for i in range(PATIENTS)]
    return request.param, splits, tiles


def test_no_source_region_serves_two_patients(cohort):
    _, _, tiles = cohort
    used = np.array([np.abs(x[:, 2:]).max(0) > 0.2 for x in tiles])
    assert used.sum(0).max() == 1
    assert used.sum(1).min() >= 1


def test_the_label_is_what_the_tiles_hold(cohort):
    kind, splits, tiles = cohort
    area = np.array([x[:, 0].sum() for x in tiles])  # of tumour, in tiles
    labels = [splits.labels[f"P{i:03d}"] for i in range(PATIENTS)]
    if kind == "binary":
        assert [a > 0.5 for a in area] == [label == "Y" for label in labels]
    elif kind == "classes":
        assert [a > 0.5 for a in area] == [label != "A" for label in labels]
        second = {
            label: {bool(x[:, 1].max() > 5) for x, y in zip(tiles, labels, strict=True) if y == label} for label in "BC"
        }
        assert sorted(map(str, second.values())) == ["{False}", "{True}"]
    elif kind == "labels":
        assert [a > 0.5 for a in area] == ["any=1" in label for label in labels]
        assert set(labels) == {"any=0;first=0", "any=1;first=0", "any=1;first=1"}
    elif kind == "numbers":
        assert np.corrcoef(np.array(labels, float) ** 2, area)[0, 1] > 0.9
    elif kind == "grades":
        of = {grade: [a for a, label in zip(area, labels, strict=True) if label == grade] for grade in "012"}
        assert max(of["0"]) < 0.5 < min(of["1"])
        assert max(of["1"]) < min(of["2"])
        assert 3 < np.mean(of["2"]) / np.mean(of["1"]) < 5  # twice the radius
    else:
        _, radius, cells = training.truths("survival", {**ABOUT, "patients": 4000}, 3)
        seen = np.array([int(cell["os_event"]) for cell in cells])
        assert 0.45 < seen.mean() < 0.55
        known = [(float(cell["os_time"]), bool(e)) for cell, e in zip(cells, seen, strict=True)]
        assert 0.65 < CoxOutcome([1.0]).score_of(radius[:, None], known) < 0.8
        own = training.truths("survival", ABOUT, 3)[1]
        assert np.corrcoef(own**2, area)[0, 1] > 0.9


def test_figures_are_those_of_others():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 40)
    outputs = rng.normal(size=(40, 3))
    two = training.figures(ClassOutcome(["N", "Y"]), outputs[:, :2], list(truth > 0))
    assert two.mean() == pytest.approx(roc_auc_score(truth > 0, outputs[:, 1] - outputs[:, 0]))
    three = training.figures(ClassOutcome(["a", "b", "c"]), outputs, list(truth))
    assert three == pytest.approx(roc_auc_score(truth, softmax(outputs, 1), multi_class="ovr", average="macro"))
    time, event = rng.exponential(size=40), rng.random(40) < 0.6
    risk = training.figures(CoxOutcome([1.0]), outputs[:, :1], list(zip(time, event, strict=True)))
    assert risk == pytest.approx(concordance_index(time, -outputs[:, 0], event))
    grade = training.figures(OrdinalOutcome(["0", "1", "2"]), outputs[:, :2], list(truth))
    stay = 1 / (1 + np.exp(-outputs[:, :2]))
    expected = (1 - stay[:, 0]) * (stay[:, 1] + 2 * (1 - stay[:, 1]))
    assert grade == pytest.approx(concordance_index(truth, expected))


def test_differences_of_classic_bags_have_the_corrected_interval():
    """Ten folds of five: SE = s sqrt(1/10 + 1/4), nine degrees of freedom; by hand."""
    values = np.array([0.0, 0.1] * 5)
    half = 2.262157 * np.sqrt(0.025 / 9) * np.sqrt(0.35)
    assert classic_bags.difference(values) == f"+0.050 ({0.05 - half:+.3f} to {0.05 + half:+.3f})"
