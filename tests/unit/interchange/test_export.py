"""What is exported comes back as it was: our store -> each format -> our store; tables as their tools read them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import feature_files as other
import numpy as np
import pytest
from slidemake.core.failures import RunError
from slidemake.core.tables import seal_tables, write_table
from slidemake.encoders.registry import registry
from slidemake.interchange.encoder import imported_record
from slidemake.interchange.export import export_run
from slidemake.interchange.stage import import_slide
from slidemake.mil.bags import open_embeddings
from slidemake.stores.arrays import StoredArray

OPTIONS = {"encoder": "uni", "format": "auto", "mapping": {}, "tile_px": None, "mpp": None, "dim": None}
RECORD = imported_record(OPTIONS, registry())
SLIDES = ("a1", "a2", "b1", "c1")
N = 7


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides of three patients with embeddings in half precision, a task of two folds with predictions."""
    folder = tmp_path_factory.mktemp("run")
    results = folder / "results"
    for number, slide in enumerate(SLIDES):
        features = np.random.default_rng(number).normal(size=(N, 1024)).astype(np.float16)
        file = other.write_trident(folder / f"{slide}.h5", features, other.grid_coords(N, 512))
        import_slide({"slide_id": slide, "mpp": None}, [str(file)], RECORD, OPTIONS, results)
    rows = [
        {"slide_id": s, "patient_id": s[0], "path": "", "status": "ok", "age": f"{40 + i}"}
        for i, s in enumerate(SLIDES)
    ]
    write_table(results / "cohort/slides.csv", [*rows, {"slide_id": "x", "patient_id": "x", "status": "failed"}])
    seal_tables(results / "cohort/tables.json", [results / "cohort/slides.csv"])
    task = results / "tasks" / "t"
    splits = [
        {"repeat": "0", "patient_id": p, "fold": f, "label": y}
        for p, f, y in (("a", 0, "n"), ("b", 1, "y"), ("c", 1, "n"))
    ]
    write_table(task / "splits.csv", splits)
    seal_tables(task / "splits.json", [task / "splits.csv"])
    predicted = [{"patient_id": p, "repeat": r, "prob_y": v} for r, v in (("0", 0.25), ("1", 0.5)) for p in "abc"]
    write_table(task / "m" / "predictions_patients.csv", predicted)
    seal_tables(task / "m" / "tables.json", [task / "m" / "predictions_patients.csv"])
    return results


def exported(results: Path, *formats: str) -> Path:
    tasks: dict[str, Any] = {"t": {"models": ["m"], "explained": None}}
    export_run(results, formats, ["uni-imported"], tasks, results / "exports" / "export.json", lambda text: None)
    return results / "exports"


def cells(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


PLACES = {
    "trident": "20x_256px_0px_overlap/features_uni/{}.h5",
    "clam": "uni/h5_files/{}.h5",
    "stamp": "uni/{}.h5",
    "parquet": "uni/{}.parquet",
}


@pytest.mark.parametrize("name", list(PLACES))
def test_round_trip(results: Path, tmp_path: Path, name: str):
    """The same features, places and order, whatever the format; and how large a tile is."""
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="parquet is for whoever has pyarrow")
    folder = exported(results, name) / name
    for slide in SLIDES:
        record = import_slide(
            {"slide_id": slide, "mpp": 0.25}, [str(folder / PLACES[name].format(slide))], RECORD, OPTIONS, tmp_path
        )
        assert (record["tool"], record["um"]) == ("plain" if name == "parquet" else name, 128)
        stores = [root / "embeddings" / "uni-imported" / f"{slide}.zarr" for root in (results, tmp_path)]
        (ours, attrs), (back, about) = (open_embeddings(store) for store in stores)
        np.testing.assert_array_equal(back.read(), ours.read())
        coords = [StoredArray(store, "coords").read() for store in stores]
        np.testing.assert_array_equal(*coords)
        assert about["tile_level0_px"] == attrs["tile_level0_px"]


def test_tables_of_clam(results: Path):
    folder = exported(results, "clam") / "clam"
    assert cells(folder / "t.csv")[0] == {"case_id": "a", "slide_id": "a1", "label": "n"}
    first = cells(folder / "splits/t/splits_0.csv")
    assert [row["test"] for row in first] == ["a1", "a2"]
    assert [row["train"] for row in first] == ["b1", "c1"]
    assert {row["val"] for row in first} == {""}
    second = cells(folder / "splits/t/splits_1.csv")
    assert [row["train"] for row in second] == ["a1", "a2"]


def test_tables_of_stamp(results: Path):
    folder = exported(results, "stamp") / "stamp"
    assert cells(folder / "clini.csv")[1] == {"PATIENT": "b", "t": "y"}
    files = cells(folder / "uni/slide.csv")
    assert [row["FILENAME"] for row in files] == [f"{slide}.h5" for slide in SLIDES]
    assert all((folder / "uni" / row["FILENAME"]).exists() for row in files)
    splits = json.loads((folder / "splits_t.json").read_text())["splits"]
    assert splits == [
        {"train_patients": ["b", "c"], "test_patients": ["a"]},
        {"train_patients": ["a"], "test_patients": ["b", "c"]},
    ]


def test_anndata_has_means_columns_folds_and_predictions(results: Path):
    import h5py

    with h5py.File(exported(results, "anndata") / "anndata/uni.h5ad") as file:
        assert file.attrs["encoding-type"] == "anndata"
        names = [name.decode() for name in file["obs/_index"][...]]
        assert names == list(SLIDES)
        array, _ = open_embeddings(results / "embeddings/uni-imported/a2.zarr")
        np.testing.assert_allclose(file["X"][1], array.read().astype(float).mean(0), rtol=1e-6)
        np.testing.assert_array_equal(file["obs/age"][...], [40, 41, 42, 43])
        assert file["obs/t_m_prob_y"][0] == 0.375
        assert [v.decode() for v in file["obs/t_fold"][...]] == ["fold 0", "fold 0", "fold 1", "fold 1"]
        assert json.loads(file["uns/encoder"][()].decode())["key"] == "uni"


def test_stamp_without_um_per_px_is_refused_and_nothing_is_left(results: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    file = other.write_trident(
        tmp_path / "a1.h5", np.ones((N, 1024), np.float32), other.grid_coords(N, 512), level0_magnification=None
    )
    import_slide({"slide_id": "a1", "mpp": None}, [str(file)], RECORD, OPTIONS, copy)
    shutil.rmtree(copy / "exports", ignore_errors=True)
    with pytest.raises(RunError, match="um per px of slide a1"):
        exported(copy, "stamp")
    assert [path for path in (copy / "exports").iterdir() if not path.name.startswith(".")] == []
