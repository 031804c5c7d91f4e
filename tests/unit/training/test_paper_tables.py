"""Bags as tables: read and refused, cross-validated without leaks, ours beside theirs; the recipe as a workflow."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from slidemake.core.failures import RunError
from slidemake.training.paper_tables import cross_validate, load_recipe, paper_rows, read_bag_table, write_paper_table

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "config" / "cohorts" / "abmil_classic.yaml"
DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
QUICK = {"hidden": 16, "attention": 8, "epochs": 20, "learning_rate": 1e-2, "bags_per_step": 8}


def write_table(path, n=40, dim=5, signal=6.0, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        x = rng.normal(size=(int(rng.integers(1, 9)), dim))
        x[0, 0] += signal * (i % 2)
        lines += [",".join([str(i % 2), f"bag{i}", *(f"{v:.4f}" for v in row)]) for row in x]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tables_become_bags(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,b,1.5,2\n0,a,3,4\n1,b,-1,0\n")
    bags, labels = read_bag_table(path)
    assert labels == {"a": 0, "b": 1}
    np.testing.assert_array_equal(bags.bag("b"), [[1.5, 2], [-1, 0]])
    np.testing.assert_array_equal(bags.bag("a"), [[3, 4]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,bag,x\n1,a,2\n", "line 1: a row is"),
        ("1,a,2\n0,b,x\n", "line 2: a row is"),
        ("1,a,2\n0,b,3,4\n", "line 2: needs .* 1 finite"),
        ("1,a,2\n0,b,nan\n", "line 2: needs"),
        ("2,a,2\n", "line 1: needs a label of 0 or 1"),
        ("1,a,2\n0,a,3\n", "bag a has both labels"),
        ("1,a,2\n1,b,3\n", "one label only"),
        ("", "one label only"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        read_bag_table(path)
    with pytest.raises(RunError, match="There is no table"):
        read_bag_table(tmp_path / "none.csv")


def test_cross_validation_finds_a_signal_tests_every_bag_once_and_repeats(tmp_path):
    bags, labels = read_bag_table(write_table(tmp_path / "t.csv"))
    first, second = cross_validate(bags, labels, QUICK, runs=2, folds=4)
    for record in (first, second):
        assert set(record["log_odds"]) == set(record["fold"]) == set(labels)
        right = [(score > 0) == (labels[bag] == 1) for bag, score in record["log_odds"].items()]
        assert record["accuracy"] == pytest.approx(np.mean(right))
        assert record["accuracy"] > 0.8  # 40 coin flips reach it once in 10,000 tries
    assert first["fold"] != second["fold"]
    assert cross_validate(bags, labels, QUICK, runs=1, folds=4)[0] == first


def test_a_tested_bag_has_no_part_in_its_model(tmp_path):
    """Turning the label of one bag changes nothing in the scores of its own fold, where it is tested and not seen."""
    bags, labels = read_bag_table(write_table(tmp_path / "t.csv", n=16))
    settings = {**QUICK, "epochs": 2, "class_weights": False}
    before = cross_validate(bags, labels, settings, runs=1, folds=2)[0]
    changed = bags.features.copy()
    start, stop = bags.rows("bag3")
    changed[start:stop] += 50
    moved = bags.__class__(**{**bags.__dict__, "features": changed})
    after = cross_validate(moved, labels, settings, runs=1, folds=2)[0]
    mates = [b for b in labels if before["fold"][b] == before["fold"]["bag3"] and b != "bag3"]
    others = [b for b in labels if before["fold"][b] != before["fold"]["bag3"]]
    assert all(before["log_odds"][b] == after["log_odds"][b] for b in mates)
    assert any(before["log_odds"][b] != after["log_odds"][b] for b in others)


def test_ours_beside_theirs(tmp_path):
    result = {"bags": 92, "runs": [{"accuracy": 0.88}, {"accuracy": 0.92}]}
    rows = paper_rows({("musk1", "a"): result, ("musk1", "b"): result}, {"musk1": {"a": [0.95, 0.04]}})
    assert rows[0]["difference"] == "-0.050"
    assert rows[0]["within"] == "no"
    assert rows[0]["ours_sd"] == "0.028"
    assert "difference" not in rows[1]
    assert paper_rows({("musk1", "a"): result}, {"musk1": {"a": [0.91, 0.04]}})[0]["within"] == "yes"
    write_paper_table(rows, tmp_path / "t.csv", tmp_path / "t.md")
    assert "| musk1 | a | 0.900 (0.028) | 0.950 (0.040) | -0.050 |" in (tmp_path / "t.md").read_text()
    assert [r["published"] for r in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())] == ["0.950", ""]


def test_recipes_are_checked(tmp_path):
    with pytest.raises(RunError, match="no file") as caught:
        load_recipe({**yaml.safe_load(RECIPE.read_text()), "tables_folder": str(tmp_path), "fold": 3})
    assert "fold: is not a key" in str(caught.value)
    assert "tables_folder=DIR" in str(caught.value)
    path = write_table(tmp_path / "t.csv")
    with pytest.raises(RunError, match=r"models\.m\.hiden: is not a setting"):
        load_recipe({"tables": {"t": str(path)}, "models": {"m": {"hiden": 3}}})
    with pytest.raises(RunError, match="folds: 1 is too few"):
        load_recipe({"tables": {"t": str(path)}, "models": {"m": {}}, "folds": 1})


@pytest.mark.skipif(not DATA, reason="needs the tables that SLIDEMAKE_TEST_DATA names")
def test_the_classic_tables_are_what_the_paper_describes():
    recipe = load_recipe({**yaml.safe_load(RECIPE.read_text()), "tables_folder": f"{DATA}/bags"})
    sizes = {}
    for name, path in recipe.tables.items():
        bags, labels = read_bag_table(path)
        sizes[name] = (len(labels), sum(labels.values()), len(bags.features), bags.dim)
    assert sizes["musk1"][:3] == (92, 47, 476)
    assert sizes["musk2"][:3] == (102, 39, 6598)
    assert sizes["elephant"][:3] == (200, 100, 1391)


@pytest.mark.workflow
def test_the_recipe_runs_as_a_workflow(tmp_path):
    write_table(tmp_path / "one.csv", n=12)
    recipe = {
        "output": str(tmp_path / "out"),
        "tables": {"one": "one.csv"},
        "runs": 1,
        "folds": 2,
        "models": {"gated": {**QUICK, "epochs": 1}},
        "published": {"one": {"gated": [0.9, 0.1]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "rules/bag_tables.smk"), "--cores", "1"]
    command += ["--configfile", str(tmp_path / "recipe.yaml"), "--config", f"tables_folder={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines())
    assert row["data_set"] == "one"
    assert 0 <= float(row["ours"]) <= 1
    assert "difference" in (tmp_path / "out/table.md").read_text()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "Nothing to be done" in again.stderr
