"""Slides that look the same in different folds, and encoders that were pretrained on the cohort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from slidemake.core.failures import RunError
from slidemake.core.words import contamination_warning
from slidemake.encoders.contamination import contamination, public_cohorts
from slidemake.encoders.registry import load_record, registry
from slidemake.mil.bags import make_bags
from slidemake.robustness.near_duplicates import near_duplicates, slide_means, stop_at_copies, warnings_of
from slidemake.splits.make import make_splits

ENCODERS = Path(__file__).parents[3] / "scripts" / "slidemake" / "encoders" / "encoders.yaml"


def cohort(change=None, n=20, dim=32, common=3.0, two_slides=False):
    """n patients with a slide of 10 tiles (the first with two, if asked); `change` edits {slide: (N, D)}."""
    rng = np.random.default_rng(0)
    tiles = {f"S{i:02d}": rng.normal(size=(10, dim)) + 2 * rng.normal(size=dim) + common for i in range(n)}
    if change:
        change(tiles)
    patients = {slide: f"P{slide[1:]}" for slide in tiles}
    if two_slides:
        patients["S01"] = "P00"
    rows = [{"slide_id": s, "patient_id": p, "site": "", "label": "ab"[int(p[1:]) % 2]} for s, p in patients.items()]
    slides = sorted(tiles, key=lambda s: (patients[s], s))
    features = np.concatenate([tiles[s] for s in slides]).astype(np.float32)
    sizes = [len(tiles[s]) for s in slides]
    bags = make_bags(features, slides, [patients[s] for s in slides], sizes, {"key": "toy"})
    return bags, make_splits(rows, "label", {"folds": 2, "seed": 1})


def copy_slide(tiles):
    tiles["S01"] = tiles["S00"] + np.random.default_rng(1).normal(size=tiles["S00"].shape) * 0.01


def apart(splits, one, two):
    return splits.folds[0][one] != splits.folds[0][two]


def test_copy_in_another_fold_stops_the_run():
    bags, splits = cohort(copy_slide)
    assert apart(splits, "P00", "P01")
    found = near_duplicates(bags, splits, 0.999)
    [pair] = found["copies"]
    assert (pair["slides"], pair["patients"]) == (["S00", "S01"], ["P00", "P01"])
    a, b = bags.slide(0).mean(0, dtype=float), bags.slide(1).mean(0, dtype=float)
    assert pair["cosine"] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)
    with pytest.raises(RunError, match=r"S00 and S01 .patients P00 and P01.*one patient_id.*near_duplicate"):
        stop_at_copies(found)
    stop_at_copies(near_duplicates(bags, splits, None))  # not looked for


def test_copy_in_the_same_fold_or_of_the_same_patient_is_none():
    bags, splits = cohort(copy_slide)
    splits.folds[0]["P01"] = splits.folds[0]["P00"]
    assert near_duplicates(bags, splits, 0.999)["copies"] == []
    bags, splits = cohort(copy_slide, two_slides=True)
    found = near_duplicates(bags, splits, 0.999)
    assert (found["copies"], found["alike"], found["slides"]) == ([], [], 20)


def test_encoder_to_which_all_slides_are_alike_is_no_alarm():
    """A large common part makes every raw cosine exceed the threshold; without it the slides have nothing in common."""
    bags, splits = cohort(common=500.0)
    found = near_duplicates(bags, splits, 0.999)
    _, means = slide_means(bags)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.999
    assert (found["copies"], found["alike"]) == ([], [])
    stop_at_copies(found)
    bags, splits = cohort(copy_slide, common=500.0)
    assert [p["slides"] for p in near_duplicates(bags, splits, 0.999)["copies"]] == [["S00", "S01"]]


def test_rescan_under_another_patient_is_warned_of():
    def rescan(tiles):
        tiles["S01"] = tiles["S00"] * 1.1 + 0.4

    bags, splits = cohort(rescan, common=1.0)
    found = near_duplicates(bags, splits, 0.9999)
    assert found["copies"] == []
    assert found["alike"][0]["slides"] == ["S00", "S01"]
    assert "S00 and S01" in warnings_of(found)[0]


def test_small_cohorts_go_by_the_cosine_alone_and_empty_slides_are_left_out():
    def few(tiles):
        copy_slide(tiles)
        tiles["S02"] = tiles["S02"][:0]

    bags, splits = cohort(few, n=6)
    splits.folds[0] |= {"P00": "0", "P01": "1"}
    found = near_duplicates(bags, splits, 0.999)
    assert found["slides"] == 5
    assert [(p["slides"], p["centred"]) for p in found["copies"]] == [(["S00", "S01"], None)]


@pytest.mark.parametrize(
    ("rows", "told", "expected"),
    [
        ([{"slide_id": "TCGA-AA-3510-01Z-00-DX1"}], None, ["TCGA"]),
        ([{"slide_id": "1", "path": "/data/TCGA-AA-3510-01Z.svs"}], None, ["TCGA"]),
        ([{"slide_id": "1", "patient_id": "C3L-00016"}, {"slide_id": "2", "patient_id": "C3N-00148"}], None, ["CPTAC"]),
        ([{"slide_id": "patient_004_node_4"}], None, ["CAMELYON17"]),
        ([{"slide_id": "tumor_001"}, {"slide_id": "normal_160"}], None, ["CAMELYON16"]),
        ([{"slide_id": "GTEX-1117F-0126"}], None, ["GTEx"]),
        ([{"slide_id": "1", "cohort": "PANDA"}], None, ["PANDA"]),
        ([{"slide_id": "1"}], "TCGA-BRCA", ["TCGA-BRCA"]),
        ([{"slide_id": "TCGA-AA-3510"}, {"slide_id": "A1"}, {"slide_id": "A2"}], None, []),
        ([{"slide_id": "tumour_1"}, {"slide_id": "tumor_12"}, {"slide_id": "TCGA"}], None, []),
        ([], None, []),
    ],
)
def test_public_cohorts_are_recognised(rows, told, expected):
    assert public_cohorts(rows, told) == expected


def test_encoders_pretrained_on_the_cohort_are_named():
    known = registry([ENCODERS])
    records = {key: load_record(key, known) for key in ("phikon_v2", "gpfm", "virchow2", "efficientnet_lite0")}
    assert contamination(records, ["TCGA"]) == {"gpfm": ["TCGA"], "phikon_v2": ["TCGA"]}
    assert contamination(records, ["CAMELYON17"]) == {"gpfm": ["CAMELYON17"]}
    assert contamination(records, []) == {}
    assert "phikon_v2 was pretrained on TCGA" in contamination_warning("phikon_v2", ["TCGA"])
