"""Monte-Carlo draws, folds that keep sites whole, dates, external cohorts, and split files of other software."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold
from slidemake.core.failures import RunError
from slidemake.splits.make import Patient, make_splits, permuted_control, read_splits, write_splits
from slidemake.splits.site_preserved import assign_sites
from slidemake.splits.table import fold_table

DATA = Path(os.environ.get("SLIDEMAKE_TEST_DATA") or "not set")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="SLIDEMAKE_TEST_DATA is not set: no files of other software")


def cohort(n=24, sites=4, **more):
    return [
        {
            "slide_id": f"S{i:03d}",
            "patient_id": f"P{i:03d}",
            "site": f"site{(i // 2) % sites}",
            "scan_date": f"2020-{1 + i % 12:02d}-15",
            "label": "tumour" if i % 2 else "normal",
            **more,
        }
        for i in range(n)
    ]


def deviation(table, fold_of, folds):
    """The objective, written as the paper writes its sum, but for the square."""
    total = 0
    for stratum in range(table.shape[1]):
        for f in range(folds):
            inside = sum(table[s, stratum] for s in range(len(table)) if fold_of[s] == f)
            total += abs(folds * inside - table[:, stratum].sum())
    return total


def test_monte_carlo_tests_a_share_of_every_class_and_site():
    splits = make_splits(cohort(40), "label", {"method": "monte_carlo", "repeats": 60, "test_fraction": 0.25})
    times = Counter()
    for repeat in range(60):
        train, val, test = splits.parts(repeat, "0")
        assert (len(train), val, len(test)) == (30, [], 10)
        assert Counter(splits.labels[p] for p in test) == {"normal": 5, "tumour": 5}
        assert max(Counter(splits.sites[p] for p in test).values()) <= 4
        times.update(test)
    # each of 60 draws tests a patient with probability 1/4: mean 15, sd 3.4; beyond 5 sd the draws are not uniform
    assert set(times) == set(splits.labels)
    assert all(abs(count - 15) < 17 for count in times.values())
    assert splits.folds[0] != splits.folds[1]
    assert splits.folds == make_splits(cohort(40)[::-1], "label", {**splits_options(splits), "repeats": 60}).folds


def splits_options(splits):
    return {"method": splits.report["method"], "test_fraction": 0.25}


def test_monte_carlo_keeps_both_sides_of_a_rare_class():
    rows = cohort(12, label="a")
    rows[0]["label"] = rows[1]["label"] = "b"
    splits = make_splits(rows, "label", {"method": "monte_carlo", "test_fraction": 0.1, "repeats": 5})
    for repeat in range(5):
        train, _, test = splits.parts(repeat, "0")
        assert sorted(splits.labels[p] for p in test) == ["a", "b"]
        assert Counter(splits.labels[p] for p in train)["b"] == 1


def test_control_of_monte_carlo_is_drawn_again_with_permuted_labels(tmp_path):
    splits = make_splits(cohort(40), "label", {"method": "monte_carlo", "repeats": 2})
    write_splits(splits, tmp_path / "splits.csv", tmp_path / "splits.json")
    again = read_splits(tmp_path / "splits.csv")
    assert (again.folds, again.fold_names) == (splits.folds, {})
    control = permuted_control(again, 3)
    assert sum(control.labels[p] == splits.labels[p] for p in splits.labels) == 20
    assert Counter(control.labels[p] for p in control.parts(1, "0")[2]) == {"normal": 4, "tumour": 4}


@pytest.mark.parametrize("seed", range(4))
def test_site_preserved_folds_are_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    table, folds = rng.integers(0, 20, (7, 2)), 3
    found, value, bound = assign_sites(table, folds)
    everything = [
        deviation(table, fold_of, folds)
        for fold_of in itertools.product(range(folds), repeat=7)
        if len(set(fold_of)) == folds
    ]
    assert value == deviation(table, found, folds) == min(everything)
    assert bound == pytest.approx(value, abs=1e-6)


def test_site_preserved_folds_beat_greedy_grouping():
    rng = np.random.default_rng(5)
    rows = []
    for s in range(18):
        for i in range(int(rng.integers(3, 40))):
            patient = f"{s:02d}_{i:02d}"
            rows.append(
                {"slide_id": patient, "patient_id": patient, "site": f"s{s}", "label": "ab"[int(rng.random() < 0.4)]}
            )
    splits = make_splits(rows, "label", {"method": "site_preserved", "folds": 5, "repeats": 2})
    assert splits.folds[0] == splits.folds[1]
    assert all(len({splits.folds[0][p] for p in splits.labels if splits.sites[p] == f"s{s}"}) == 1 for s in range(18))
    sites = sorted(set(splits.sites.values()))
    table = np.array([[sum(r["site"] == s and r["label"] == c for r in rows) for c in "ab"] for s in sites])
    ours = splits.report["about"]["deviation"]
    assert ours == deviation(table, [int(splits.report["about"]["site_folds"][s]) for s in sites], 5)
    y, groups = np.array([r["label"] for r in rows]), np.array([r["site"] for r in rows])
    for seed in range(5):
        greedy = {}
        dealer = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for f, (_, test) in enumerate(dealer.split(y, y, groups)):
            greedy |= dict.fromkeys(groups[test], f)
        assert ours <= deviation(table, [greedy[s] for s in sites], 5)
    table_text = fold_table(splits.report)
    assert len(table_text.splitlines()) == 6
    assert all(f"at {s}" in table_text for s in sites)


def test_site_preserved_needs_sites():
    with pytest.raises(RunError, match=r"4 sites .*cannot be dealt to 5 folds.*splits.folds to 4"):
        make_splits(cohort(), "label", {"method": "site_preserved"})
    with pytest.raises(RunError, match="is empty for P000"):
        make_splits(cohort(site=""), "label", {"method": "site_preserved"})


@needs_data
def test_site_preserved_folds_of_a_real_cohort():
    """TCGA: the tissue source site is in the barcode; 628 patients of many sites."""
    with open(DATA / "cohorts/tcga-crc/TCGA-CRC-DX_SLIDE.csv", newline="") as handle:
        found = sorted({row["PATIENT"] for row in csv.DictReader(handle)})
    rows = [
        {"slide_id": p, "patient_id": p, "site": p.split("-")[1], "label": str(i % 3 == 0)} for i, p in enumerate(found)
    ]
    splits = make_splits(rows, "label", {"method": "site_preserved", "folds": 3})
    by_site = {}
    for p, fold in splits.folds[0].items():
        by_site.setdefault(splits.sites[p], set()).add(fold)
    assert len(by_site) > 20
    assert all(len(folds) == 1 for folds in by_site.values())
    about = splits.report["about"]
    assert about["deviation"] <= about["lower_bound"] + 1e-6


def test_temporal_trains_on_the_past():
    rows = cohort(24)
    rows.append({**rows[11], "slide_id": "late", "scan_date": "2023-01-01"})  # a patient's date is the first
    options = {"method": "temporal", "cutoff": "2020-10-01", "gap_days": 40, "repeats": 2}
    splits = make_splits(rows, "label", options)
    dates = {r["patient_id"]: r["scan_date"] for r in rows[:24]}
    train, val, test = splits.parts(1, "0")
    assert val == []
    assert {dates[p][:7] for p in test} == {"2020-10", "2020-11", "2020-12"}
    assert {dates[p][:7] for p in train} == {f"2020-{m:02d}" for m in range(1, 9)}  # September is the gap's
    assert [x["patient_id"] for x in splits.report["left_out"]] == ["P008", "P020"]
    assert "within 40 days of the cut-off 2020-10-01" in splits.report["left_out"][0]["reason"]
    assert splits.fold_names == {"0": "from 2020-10-01"}
    by_share = make_splits(rows, "label", {"method": "temporal", "test_fraction": 0.25})
    assert by_share.report["about"]["cutoff"] == "2020-10-15"
    assert len(by_share.parts(0, "0")[2]) == 6
    # prevalence on both sides is in the table
    assert {row["fold"]: row["classes"] for row in by_share.report["table"]}["0"] == {"normal": 2, "tumour": 4}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"scan_date": ""}, {}, "date of every patient; it is empty for P000"),
        ({"scan_date": "2020-01-01"}, {}, "two dates at least; all patients are of 2020-01-01"),
        ({"scan_date": "last May"}, {}, "Slide S000: scan_date is 'last May'"),
        ({}, {"cutoff": "2031-01-01"}, "no patient is tested on.*2020-01-15 to 2020-12-15"),
        ({}, {"cutoff": "2020-02-01", "gap_days": 100}, "no patient is trained on"),
    ],
)
def test_temporal_without_usable_dates(change, options, message):
    with pytest.raises(RunError, match=message):
        make_splits(cohort(**change), "label", {"method": "temporal", **options})


def test_external_cohort_is_never_trained_on():
    splits = make_splits(cohort(), "label", {"method": "external", "column": "site", "test": ["site1", "site3"]})
    train, val, test = splits.parts(0, "0")
    assert {splits.sites[p] for p in test} == {"site1", "site3"}
    assert {splits.sites[p] for p in train} == {"site0", "site2"}
    assert (val, splits.fold_names) == ([], {"0": "site1 and site3"})
    with pytest.raises(RunError, match="no patient has elsewhere; there are site0, site1"):
        make_splits(cohort(), "label", {"method": "external", "column": "site", "test": ["elsewhere"]})


def test_folds_are_balanced_by_the_strata_of_a_task():
    rows = [{**r, "label": f"{i / 7:.3f}"} for i, r in enumerate(cohort(40))]  # a number: each label once

    splits = make_splits(rows, {"label": "label", "type": "regression"}, {"folds": 5})
    for fold in splits.tested(0):
        quartile = [round(float(splits.labels[p]) * 7) // 10 for p in splits.parts(0, fold)[2]]
        assert sorted(Counter(quartile).values()) == [2, 2, 2, 2]
    assert Patient("p", "a", "", "", ()).stratum == "a"


@needs_data
def test_clam_files_as_their_users_have_them():
    """Slides stand for patients: CLAM's labels are of slides, and its example has patients of two classes."""
    with open(DATA / "cohorts/clam/dataset_csv/tumor_subtyping_dummy_clean.csv", newline="") as handle:
        rows = [{**r, "patient_id": r["slide_id"], "site": ""} for r in csv.DictReader(handle)]
    folder = DATA / "cohorts/clam/splits/task_2_tumor_subtyping_50"
    splits = make_splits(rows, "label", {"method": "file", "file": str(folder)})
    with open(folder / "splits_0_descriptor.csv", newline="") as handle:
        described = {r[""]: [int(float(r[part])) for part in ("train", "val", "test")] for r in csv.DictReader(handle)}
    assert len(described) == 3
    for label, counts in described.items():
        assert [sum(splits.labels[p] == label for p in part) for part in splits.parts(0, "0")] == counts
    left_out = [x for x in splits.report["left_out"] if x["reason"] == "not in the split file"]
    assert len(left_out) == len(rows) - len(splits.folds[0]) > 0  # CLAM kept half of the training cases


def clam(folder, splits):
    folder.mkdir()
    for i, parts in enumerate(splits):
        longest = max(map(len, parts.values()))
        with open(folder / f"splits_{i}.csv", "w", newline="") as handle:
            out = csv.writer(handle)
            out.writerow(["", *parts])
            for row in range(longest):
                out.writerow([row, *(ids[row] if row < len(ids) else "" for ids in parts.values())])
    (folder / "splits_0_bool.csv").write_text(",train,val,test\nS000,True,False,False\n")
    return folder


def test_several_clam_splits_are_repeats(tmp_path):
    ids = [f"S{i:03d}" for i in range(24)]
    parts = [
        {"train": ids[:12], "val": ids[12:18], "test": ids[18:]},
        {"train": ids[6:18], "val": ids[18:], "test": ids[:6]},
    ]
    splits = make_splits(cohort(), "label", {"method": "file", "file": str(clam(tmp_path / "c", parts))})
    assert sorted(splits.folds) == [0, 1]
    for repeat, of in enumerate(parts):
        sides = splits.parts(repeat, "0")
        assert [[f"S{p[1:]}" for p in side] for side in sides] == [sorted(of[k]) for k in ("train", "val", "test")]
    with pytest.raises(RunError, match=r"holds True and False; name CLAM's splits_<i>.csv"):
        make_splits(cohort(), "label", {"method": "file", "file": str(tmp_path / "c" / "splits_0_bool.csv")})


def test_stamp_kfold_is_one_repeat_and_uneven_splits_are_several(tmp_path):
    ids = [f"P{i:03d}" for i in range(24)]
    kfold = {
        "splits": [
            {
                "train_patients": [p for p in ids if int(p[1:]) // 2 % 3 != f],
                "test_patients": [p for p in ids if int(p[1:]) // 2 % 3 == f],
            }
            for f in range(3)
        ]
    }
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(kfold))
    splits = make_splits(cohort(), "label", {"method": "file", "file": str(path)})
    assert splits.tested(0) == ["0", "1", "2"]
    assert sorted(splits.folds) == [0]
    for f in range(3):
        train, _, test = splits.parts(0, str(f))
        assert train == kfold["splits"][f]["train_patients"]
        assert test == kfold["splits"][f]["test_patients"]
    kfold["splits"][0]["train_patients"].pop()
    path.write_text(json.dumps(kfold))
    assert sorted(make_splits(cohort(), "label", {"method": "file", "file": str(path)}).folds) == [0, 1, 2]


def test_patho_bench_tsv(tmp_path):
    lines = ["case_id\tslide_id\tgrade\tfold_0\tfold_1\tfold_10"]
    for i in range(24):
        lines.append(
            f"P{i:03d}\tS{i:03d}.svs\t{i % 2}\t{'test' if i < 6 else 'train'}\t{'train' if i < 12 else 'test'}\ttrain"
        )
    lines[2] = lines[2].removesuffix("train") + "test"
    lines[3] = lines[3].removesuffix("train") + "val"
    lines.append("X\tunknown\t1\ttrain\ttest\ttrain")
    path = tmp_path / "k=all.tsv"
    path.write_text("\n".join(lines))
    splits = make_splits(cohort(), "label", {"method": "file", "file": str(path)})
    assert splits.parts(0, "0")[2] == [f"P{i:03d}" for i in range(6)]
    assert splits.parts(1, "0")[2] == [f"P{i:03d}" for i in range(12, 24)]
    assert splits.parts(2, "0")[1:] == (["P002"], ["P001"])
    assert "1 ids of k=all.tsv are not in the cohort: unknown" in splits.report["warnings"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("slide,fold\nS000,1\n", "a.csv", "has the columns slide, fold; expected CLAM's train, val, test"),
        ("", "a.csv", r"has the columns \(none\)"),
        ('{"folds": []}', "a.json", "is not a split file of STAMP"),
        ("[1, 2]", "a.json", "is not a split file of STAMP"),
        ("case_id\tslide_id\tfold_0\nP000\tS000\tTRIAN\n", "a.tsv", "row 2: fold_0 is 'TRIAN'"),
        (",train,val,test\n0,X1,X2,X3\n", "a.csv", "none of the ids.*the file's first: X1"),
        (
            ",train,val,test\n0,S000,,S001\n1,S001,,\n",
            "a.csv",
            r"puts patients on more than one side: P001 \(test, train\)",
        ),
        (",train,val,test\n0,S000,S001,\n", "a.csv", "split 0 of .* tests no patient"),
    ],
)
def test_split_files_that_cannot_be_used(tmp_path, text, name, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        make_splits(cohort(), "label", {"method": "file", "file": str(tmp_path / name)})


def test_folder_without_clam_splits(tmp_path):
    with pytest.raises(RunError, match=r"holds no splits_0\.csv"):
        make_splits(cohort(), "label", {"method": "file", "file": str(tmp_path)})
