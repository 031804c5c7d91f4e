"""Folds of patients: balance, determinism, leaks, the three methods."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from slidemake.core.failures import RunError
from slidemake.splits.make import (
    check_leakage,
    collect_patients,
    cramers_v,
    make_splits,
    permuted_control,
    read_splits,
    split_rows,
    write_splits,
)


def cohort(n=24, sites=3, **more):
    """n patients with two slides each; labels alternate, sites go round."""
    return [
        {
            "slide_id": f"P{i:03d}_S{k}",
            "patient_id": f"P{i:03d}",
            "site": f"site{(i // 2) % sites}",
            "status": "ok",
            "failure_code": "",
            "label": "tumour" if i % 2 else "normal",
            **more,
        }
        for i in range(n)
        for k in range(2)
    ]


def test_kfold_tests_every_patient_once_and_balances_class_and_site():
    splits = make_splits(cohort(23), "label", {"folds": 5, "repeats": 3, "seed": 4})
    for repeat in range(3):
        assigned = splits.folds[repeat]
        assert len(assigned) == 23
        assert splits.tested(repeat) == ["0", "1", "2", "3", "4"]
        for part in (None, *[("label", c) for c in ("normal", "tumour")]):
            members = [p for p in assigned if part is None or splits.labels[p] == part[1]]
            sizes = [sum(assigned[p] == f for p in members) for f in splits.tested(repeat)]
            assert max(sizes) - min(sizes) <= 1
        cells = Counter((splits.labels[p], splits.sites[p], f) for p, f in assigned.items())
        for label in ("normal", "tumour"):
            for site in ("site0", "site1", "site2"):
                sizes = [cells[label, site, f] for f in splits.tested(repeat)]
                assert max(sizes) - min(sizes) <= 1
    assert splits.folds[0] != splits.folds[1]


def test_same_folds_whatever_the_order_of_rows():
    rows = cohort()
    first = make_splits(rows, "label", {"repeats": 2})
    second = make_splits([rows[i] for i in np.random.default_rng(0).permutation(len(rows))], "label", {"repeats": 2})
    assert split_rows(first) == split_rows(second)
    assert first.folds[0] == make_splits(rows, "label", {"repeats": 1}).folds[0]


def test_parts_are_disjoint_and_complete():
    splits = make_splits(cohort(), "label", {"repeats": 2})
    for fold in splits.tested(1):
        train, val, test = splits.parts(1, fold)
        assert not set(train) & set(test)
        assert val == []
        assert set(train) | set(test) == set(splits.labels)


def test_patients_without_slides_or_label_are_left_out_and_listed():
    rows = cohort(12)
    rows[0] |= {"status": "failed", "failure_code": "no_tissue"}
    rows[1] |= {"status": "failed", "failure_code": "truncated"}
    rows[2]["status"] = "failed"  # the other slide of P001 stays
    for row in rows[4:6]:
        row["label"] = ""
    rows[6]["status"] = rows[7]["status"] = "excluded"
    patients, left_out = collect_patients(rows, "label")
    assert [p.patient_id for p in patients] == [f"P{i:03d}" for i in range(12) if i not in (0, 2, 3)]
    assert patients[0].slides == ("P001_S1",)
    assert [x["patient_id"] for x in left_out] == ["P000", "P002"]
    assert "no_tissue" in left_out[0]["reason"]
    assert "truncated" in left_out[0]["reason"]
    report = make_splits(rows, "label", {"folds": 2}).report
    assert report["left_out"] == left_out
    assert report["patients"] == 9


def test_two_labels_for_one_patient():
    rows = cohort()
    rows[1]["label"] = "tumour"
    with pytest.raises(RunError, match=r"P000 has label = normal and tumour"):
        make_splits(rows, "label", {})


def test_one_class_and_too_few_patients_and_unknown_column():
    with pytest.raises(RunError, match=r"all 24 patients have the same class, a"):
        make_splits(cohort(label="a"), "label", {})
    with pytest.raises(RunError, match=r"4 usable patients cannot be dealt to 5 folds"):
        make_splits(cohort(4), "label", {})
    with pytest.raises(RunError, match="no column 'grade'"):
        make_splits(cohort(), "grade", {})


def test_rare_class_is_warned_of():
    rows = cohort(20, label="normal")
    for row in rows[:6]:
        row["label"] = "tumour"
    warnings = make_splits(rows, "label", {"folds": 5}).report["warnings"]
    assert sum("no patient of class tumour" in w for w in warnings) == 2
    assert any("class tumour has 3 patients" in w for w in warnings)


def test_given_train_val_test(tmp_path):
    rows = cohort(12)
    for i, row in enumerate(rows):
        row["fold_of"] = ("Training", "validation", "test")[(i // 2) // 4]
    splits = make_splits(rows, "label", {"method": "given", "column": "fold_of"})
    train, val, test = splits.parts(0, "0")
    assert [len(train), len(val), len(test)] == [4, 4, 4]
    assert splits.tested(0) == ["0"]
    assert splits.fold_names == {"0": "test"}
    write_splits(splits, tmp_path / "splits.csv", tmp_path / "splits.json")
    again = read_splits(tmp_path / "splits.csv")
    assert again.folds == splits.folds
    assert again.fold_names == splits.fold_names
    assert again.parts(0, "0") == (train, val, test)


def test_given_folds_that_tear_a_patient_apart():
    rows = cohort()
    for i, row in enumerate(rows):
        row["split"] = str(i % 4)
    with pytest.raises(RunError, match=r"more than one fold.*P000 \(0, 1\)"):
        make_splits(rows, "label", {"method": "given"})
    with pytest.raises(RunError, match="split column is empty for P000"):
        make_splits(cohort(split=""), "label", {"method": "given"})


def test_leave_one_site_out():
    splits = make_splits(cohort(), "label", {"method": "leave_one_site_out"})
    assert splits.fold_names == {"0": "site0", "1": "site1", "2": "site2"}
    for fold, site in splits.fold_names.items():
        assert {splits.sites[p] for p in splits.parts(0, fold)[2]} == {site}
    with pytest.raises(RunError, match="needs two sites"):
        make_splits(cohort(sites=1), "label", {"method": "leave_one_site_out"})


def test_site_that_holds_a_whole_class_cannot_be_left_out():
    rows = cohort()
    for row in rows:
        row["site"] = row["label"]
    with pytest.raises(RunError, match="No model can be trained"):
        make_splits(rows, "label", {"method": "leave_one_site_out"})


def test_leaks_stop_the_run(tmp_path):
    rows = [{"repeat": 0, "patient_id": "A", "fold": "0"}, {"repeat": 0, "patient_id": "A", "fold": "1"}]
    with pytest.raises(RunError, match=r"A \(folds 0, 1\)"):
        check_leakage(rows)
    check_leakage([rows[0], {**rows[1], "repeat": 1}])  # another repeat is another split
    splits = make_splits(cohort(), "label", {})
    write_splits(splits, tmp_path / "splits.csv", tmp_path / "splits.json")
    with open(tmp_path / "splits.csv", "a") as handle:
        handle.write(f"0,P000,{(int(splits.folds[0]['P000']) + 1) % 5},1,normal,site0\n")
    with pytest.raises(RunError, match=r"splits.csv does not match its checksum.* Delete .*splits.csv"):
        read_splits(tmp_path / "splits.csv")
    (tmp_path / "splits.json").unlink()  # a table that nobody sealed
    with pytest.raises(RunError, match="P000"):
        read_splits(tmp_path / "splits.csv")


def test_one_scan_under_two_patients_is_a_leak():
    splits = make_splits(cohort(), "label", {})
    other = next(p for p, f in splits.folds[0].items() if f != splits.folds[0]["P000"])
    with pytest.raises(RunError, match=f"belongs to patients P000, {other}"):
        make_splits(cohort(), "label", {}, {"P000_S0": "abc", f"{other}_S1": "abc"})


def test_table_on_disk_is_the_same_bytes_and_comes_back(tmp_path):
    splits = make_splits(cohort(), "label", {"repeats": 3})
    for name in ("a", "b"):
        write_splits(splits, tmp_path / f"{name}.csv", tmp_path / f"{name}.json")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    again = read_splits(tmp_path / "a.csv")
    assert (again.folds, again.labels, again.sites) == (splits.folds, splits.labels, splits.sites)
    assert again.report["method"] == "kfold"


def test_permuted_labels_do_not_agree_with_the_truth():
    splits = make_splits(cohort(), "label", {"repeats": 2})
    for seed in range(5):
        control = permuted_control(splits, seed)
        assert Counter(control.labels.values()) == Counter(splits.labels.values())
        agree = sum(control.labels[p] == splits.labels[p] for p in splits.labels)
        assert agree == 12
        for fold in control.tested(0):
            counts = Counter(control.labels[p] for p in control.parts(0, fold)[2])
            assert abs(counts["normal"] - counts["tumour"]) <= 1
    by_site = make_splits(cohort(), "label", {"method": "leave_one_site_out"})
    control = permuted_control(by_site, 0)
    assert control.folds == by_site.folds
    for fold in control.tested(0):
        members = control.parts(0, fold)[2]
        assert Counter(control.labels[p] for p in members) == Counter(by_site.labels[p] for p in members)


def test_cramers_v():
    assert cramers_v(list("aabb"), list("xxyy")) == pytest.approx(1)
    assert cramers_v(list("abab"), list("xxyy")) == pytest.approx(0)
    assert cramers_v(list("aaaa"), list("xxyy")) == 0
    # hand-computed: [[3, 1], [1, 3]], expected 2 everywhere, chi2 = 4 * 1 / 2 = 2, V = sqrt(2 / 8)
    assert cramers_v(list("aaaabbbb"), list("xxxyxyyy")) == pytest.approx(0.5)
