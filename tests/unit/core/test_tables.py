"""Tables are sealed by who writes them, and compared by who reads them; bundles and records know their place."""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import numpy as np
import pytest
from slidemake.core.bundle_place import check_unseen, trained_on
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import check_place, file_sums, placed, write_json
from slidemake.core.tables import read_columns, read_table, seal_tables, write_table
from slidemake.explain.stage import Explainer
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.mil.aggregators import build_aggregator
from slidemake.mil.bundle import Group, is_complete, load_bundle, read_info, save_bundle
from slidemake.splits.make import Splits
from slidemake.tasks.prediction_table import read_predictions

SCRIPTS = Path(__file__).parents[3] / "scripts"
ROWS = [{"patient_id": "@P1", "site": "=lab"}, {"patient_id": "P2", "site": "'-x(1)"}]


@pytest.fixture
def cohort(tmp_path) -> Path:
    folder = tmp_path / "results" / "cohort"
    folder.mkdir(parents=True)
    write_table(folder / "slides.csv", ROWS)
    seal_tables(folder / "tables.json", [folder / "slides.csv"])
    return folder


def test_a_sealed_table_comes_back_as_it_was(cohort):
    assert read_table(cohort / "slides.csv") == ROWS
    assert read_columns(cohort / "slides.csv")[0] == ["patient_id", "site"]


@pytest.mark.parametrize("how", ["edited", "rotten", "seal rotten", "of another folder"])
def test_a_table_that_is_not_as_written_stops_the_run(cohort, how):
    table, seal = cohort / "slides.csv", cohort / "tables.json"
    if how == "edited":
        table.write_text(table.read_text().replace("P2", "P3"))
    elif how == "rotten":
        data = bytearray(table.read_bytes())
        data[3] ^= 0x10
        table.write_bytes(data)
    elif how == "seal rotten":
        seal.write_text(seal.read_text().replace("slidemake-tables", "slidemake-tablet"))
    else:
        (cohort.parent / "predictions").mkdir()
        for path in (table, seal):
            path.rename(cohort.parent / "predictions" / path.name)
        table = cohort.parent / "predictions" / "slides.csv"
    with pytest.raises(RunError, match=r"(slides.csv|tables.json) .* Delete .*slides.csv and give the same"):
        read_table(table)


def test_results_may_be_moved(cohort, tmp_path):
    moved = tmp_path / "elsewhere"
    cohort.parent.rename(moved)
    assert read_table(moved / "cohort" / "slides.csv") == ROWS


def test_a_table_that_is_missing_is_said_so(tmp_path):
    with pytest.raises(RunError, match=r"slides.csv is missing. Give the same command again"):
        read_table(tmp_path / "slides.csv")


def test_nothing_else_reads_a_table_of_results():
    """One reader: whatever else opens a CSV reads what users or others made."""
    own = {
        "core/tables",
        "core/csv_cells",
        "cohort/sheet_table",
        "splits/files",
        "demo/cohort",
        "training/paper_tables",
    }
    for path in sorted(SCRIPTS.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        of_csv = {n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id in ("csv", "csv_cells")}
        if of_csv & {"DictReader", "reader"}:
            assert path.relative_to(SCRIPTS / "slidemake").with_suffix("").as_posix() in own, path


def test_every_table_of_results_has_a_seal():
    """A table that a script or module writes is sealed in the same file, or by a JSON's `files` there."""
    for path in sorted(SCRIPTS.rglob("*.py")):
        text = path.read_text()
        if "write_table(" in text and path.stem not in ("tables", "write_paper_table", "paper_tables"):
            assert "seal_tables(" in text or "file_sums(" in text, path


def test_predictions_of_every_type_keep_ids_that_begin_like_formulas(tmp_path):
    """Patients such as @P1 and sites such as =lab were lost from the subgroups of tasks that are no plain classes."""
    first = {"patient_id": "@P1", "site": "=lab", "label": "1.5", "repeat": 0, "fold": 0, "predicted": 1.25}
    path = tmp_path / "p.csv"
    write_table(path, [first, {**first, "patient_id": "P2", "site": ""}])
    with open(path, newline="") as handle:
        assert next(csv.DictReader(handle))["patient_id"] == "'@P1"
    found = read_predictions(path, "m", "regression")
    assert found.patients == ("@P1", "P2")
    assert found.sites == ("=lab", "")
    classes = {**first, "label": "a", "predicted": "a", "prob_a": 0.75, "prob_b": 0.25}
    write_table(path, [classes])
    assert read_predictions(path, "m", "binary").patients == ("@P1",)


# -- places --------------------------------------------------------------------------------------------------------


def test_a_json_knows_its_place(tmp_path):
    path = tmp_path / "tasks" / "a" / "results" / "tasks" / "t" / "m" / "train.json"
    assert placed(path) == {"place": "tasks/t/m/train.json"}
    check_place(path, placed(path))
    check_place(tmp_path / "moved" / "tasks" / "t" / "m" / "train.json", placed(path))
    for other in ("tasks/t/n/train.json", "tasks/u/m/train.json", "atasks/t/m/train.json"):
        with pytest.raises(SlideFailure, match=r"was written as tasks/t/m/train.json"):
            check_place(tmp_path / other, placed(path))
    assert placed(tmp_path / "alone.json") == {}


def test_predictions_of_another_model_are_refused(tmp_path):
    """Whole folders of two models that changed places: evaluate would have reported one as the other."""
    for model in ("abmil", "shuffled_label"):
        folder = tmp_path / "results" / "tasks" / "t" / model
        folder.mkdir(parents=True)
        row = {"patient_id": "P1", "label": "a", "repeat": 0, "fold": 0, "prob_a": 0.75, "prob_b": 0.25}
        write_table(folder / "predictions_patients.csv", [row])
        sums = file_sums(folder, ["predictions_patients.csv"])
        write_json(folder / "train.json", {**placed(folder / "train.json"), "files": sums})
    one, two = (tmp_path / "results" / "tasks" / "t" / name for name in ("abmil", "shuffled_label"))
    read_predictions(one / "predictions_patients.csv", "abmil", "binary")
    one.rename(tmp_path / "x")
    two.rename(one)
    with pytest.raises(RunError, match=r"was written as tasks/t/shuffled_label/train.json"):
        read_predictions(one / "predictions_patients.csv", "abmil", "binary")


def test_a_manifest_of_another_grid_is_refused(tmp_path):
    path = tmp_path / "manifests" / "tiles" / "224px_0.5mpp" / "r00000.json"
    run_rack("tiles", path, [{"slide_id": "a", "status": "ok"}], lambda record: {"fingerprint": "x"}, rack="r00000")
    assert len(read_manifest(path, "tiles")) == 1
    other = tmp_path / "manifests" / "tiles" / "512px_0.5mpp" / "r00000.json"
    other.parent.mkdir()
    path.rename(other)
    with pytest.raises(RunError, match=r"was written as manifests/tiles/224px_0.5mpp/r00000.json"):
        read_manifest(other, "tiles")


INFO = {
    "fingerprint": "f",
    "target": {"type": "binary", "classes": ["n", "p"]},
    "classes": ["n", "p"],
    "threshold": 0.5,
    "encoder": {"key": "e"},
    "aggregator": {"name": "mean_pool", "parameters": {}, "features": 4},
}


def fold(results: Path, number: int, train: list[str]) -> Path:
    folder = results / "tasks" / "t" / "m" / "bundles" / f"repeat0_fold{number}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    training = {"repeat": 0, "fold": str(number), "train": train, "val": []}
    group = Group(folder.name, {"temperature": 1.0}, (build_aggregator("mean_pool", 4, 2, {}),))
    save_bundle(folder, {**INFO, "training": training}, [group])
    return folder


def test_a_bundle_knows_whose_it_is_and_is_refused_elsewhere(tmp_path):
    one, two = fold(tmp_path, 0, ["B"]), fold(tmp_path, 1, ["A"])
    info = read_info(one, of_run=True)
    assert (info["task"], info["model"], info["place"]) == ("t", "m", "tasks/t/m/bundles/repeat0_fold0/bundle.json")
    assert is_complete(one, "f")
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    assert not is_complete(one, "f")  # training makes it again
    with pytest.raises(RunError, match=r"as tasks/t/m/bundles/repeat0_fold1/.* Delete .*repeat0_fold0 and give"):
        load_bundle(one, of_run=True)


def test_a_bundle_may_be_copied_anywhere_but_not_into_another_model(tmp_path):
    one = fold(tmp_path, 0, ["B"])
    write_json(tmp_path / "tasks/t/m/train.json", placed("tasks/t/m/train.json"))
    assert read_info(one)["task"] == "t"
    (tmp_path / "mine").mkdir()
    one.rename(tmp_path / "mine" / "bundle")
    assert read_info(tmp_path / "mine" / "bundle")["task"] == "t"  # as for `predict`
    (tmp_path / "tasks" / "t" / "m").rename(tmp_path / "archived")
    assert read_info(tmp_path / "mine" / "bundle")
    write_json(tmp_path / "mine" / "train.json", placed("tasks/t/other/train.json"))
    with pytest.raises(RunError, match=r"the train.json beside it as tasks/t/other/train.json"):
        read_info(tmp_path / "mine" / "bundle")


def test_no_slide_is_explained_by_a_model_that_has_seen_its_patient(tmp_path):
    """Even one that lies in its place: splits and bundles of two runs that were mixed."""
    fold(tmp_path, 0, ["B"]), fold(tmp_path, 1, ["A", "C"])
    splits = Splits({0: {"A": "0", "B": "1", "C": "1"}}, {}, {}, {})
    explainer = Explainer(tmp_path, "e", tmp_path / "tasks" / "t" / "m", splits, {}, tmp_path / "explain")
    explainer.bundle = lambda repeat, number: OnlyInfo(tmp_path, number)
    assert len(explainer._bundles("A")) == 1
    with pytest.raises(RunError, match="the model of repeat 0, fold 1 was trained on C"):
        explainer._bundles("C")


class OnlyInfo:
    """A bundle of which only bundle.json is looked at."""

    def __init__(self, results: Path, number: str):
        self.info = read_info(results / "tasks" / "t" / "m" / "bundles" / f"repeat0_fold{number}", of_run=True)


def test_patients_who_decided_when_to_stop_count_as_seen():
    assert trained_on({"training": {"train": ["a"], "val": ["b"], "patients": ["c"]}}) == {"a", "b", "c"}
    check_unseen(["d"], {"training": {"train": ["a"]}}, "m")
    with pytest.raises(RunError, match="m was trained on b"):
        check_unseen(np.array(["b", "d"]).tolist(), {"training": {"val": ["b"]}}, "m")
