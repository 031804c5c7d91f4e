"""Imported features become embedding stores that the rest of a run takes for its own; what does not fit is a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import feature_files as other
import numpy as np
import pytest
from slidemake.core.failures import SlideFailure
from slidemake.core.files import write_json
from slidemake.encoders.registry import registry
from slidemake.interchange.encoder import imported_record, unknown_encoder
from slidemake.interchange.stage import import_slide, same_name, screen_or_pass
from slidemake.mil.bags import load_bags, open_embeddings
from slidemake.stores.arrays import StoredArray
from slidemake.stores.integrity import problems

N, D = 9, 1024
OPTIONS = {"encoder": "uni", "format": "auto", "mapping": {}, "tile_px": None, "mpp": None, "dim": None}


def features(rows: int = N, width: int = D, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def run(
    results: Path, path: Path | list[str], slide: str = "a", mpp: float | None = None, **options: Any
) -> dict[str, Any]:
    options = {**OPTIONS, **options}
    files = path if isinstance(path, list) else [str(path)]
    return import_slide({"slide_id": slide, "mpp": mpp}, files, imported_record(options, registry()), options, results)


def stored(
    results: Path, slide: str = "a", encoder: str = "uni-imported"
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    path = results / "embeddings" / encoder / f"{slide}.zarr"
    array, attrs = open_embeddings(path)
    return array.read(), StoredArray(path, "coords").read(), attrs


def test_a_store_as_our_own(tmp_path: Path):
    coords = other.grid_coords(N, 512)
    record = run(tmp_path, other.write_trident(tmp_path / "a.h5", features(), coords))
    read, where, attrs = stored(tmp_path)
    np.testing.assert_array_equal(read, features())
    np.testing.assert_array_equal(where, coords)
    assert where.dtype == np.int32
    assert (record["tool"], record["tiles"], record["um"], record["notes"]) == ("trident", N, 128, [])
    assert (attrs["tile_level0_px"], attrs["stride_level0_px"], attrs["grid"]) == ([512, 512], 512, "256px_0.5mpp")
    assert attrs["mpp"] == {"requested": 0.5, "source": 0.25, "source_of": "features"}
    assert attrs["encoder"]["key"] == "uni"
    assert list(problems(tmp_path / "embeddings" / "uni-imported" / "a.zarr", every_byte=True)) == []
    bags = load_bags(tmp_path / "embeddings" / "uni-imported", [("a", "p")])
    np.testing.assert_array_equal(bags.bag("p"), features())


def test_it_is_done_once_and_again_when_something_changes(tmp_path: Path):
    path = other.write_trident(tmp_path / "a.h5", features(), other.grid_coords(N, 512))
    first = run(tmp_path, path)
    again = run(tmp_path, path)
    assert again.pop("reused") is True
    assert again == first
    assert run(tmp_path, path, mpp=0.24)["fingerprint"] != first["fingerprint"]
    other.write_trident(path, features(seed=1), other.grid_coords(N, 512))
    assert "reused" not in run(tmp_path, path)
    np.testing.assert_array_equal(stored(tmp_path)[0], features(seed=1))


def test_micrometres_become_pixels_by_the_slides_mpp(tmp_path: Path):
    """256 um at 0.25 um per px are 1024 px; without any um per px a pixel is a micrometre, and the store says so."""
    path = other.write_stamp(tmp_path / "a.h5", features(), other.grid_coords(N, 256).astype(float), **other.STAMP_2)
    record = run(tmp_path, path, mpp=0.25)
    _, where, attrs = stored(tmp_path)
    np.testing.assert_array_equal(where, other.grid_coords(N, 1024))
    assert attrs["tile_level0_px"] == [1024, 1024]
    assert record["um"] == 256
    run(tmp_path, path)
    _, where, attrs = stored(tmp_path)
    np.testing.assert_array_equal(where, other.grid_coords(N, 256))
    assert attrs["mpp"]["source_of"] == "coordinates"


def test_another_field_of_view_is_a_note_that_names_both(tmp_path: Path):
    """STAMP's 256 um against the 128 um that the record of UNI cuts: 1.143 against 0.571 um per px."""
    path = other.write_stamp(tmp_path / "a.h5", features(), other.grid_coords(N, 256).astype(float), **other.STAMP_2)
    (note,) = run(tmp_path, path)["notes"]
    assert "256 um (1.14 um per px" in note
    assert "128 um (0.571)" in note


def test_slide_size_and_mpp_are_those_of_the_slide(tmp_path: Path):
    about = {"slide_id": "a", "status": "ok", "width": 3000, "height": 3000, "mpp": 0.2527}
    write_json(tmp_path / "slides/a/slide.json", about)
    inside = other.write_trident(tmp_path / "a.h5", features(), other.grid_coords(N, 512))
    run(tmp_path, inside)
    assert stored(tmp_path)[2]["mpp"]["source"] == 0.2527
    outside = other.write_trident(tmp_path / "b.h5", features(), other.grid_coords(N, 1024))
    with pytest.raises(SlideFailure, match="outside of the slide of 3000 x 3000 px, the first at 3072"):
        run(tmp_path, outside)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(tmp_path: Path, value: float):
    spoilt = features()
    spoilt[4, 7] = value
    with pytest.raises(SlideFailure, match="the first is tile 4") as caught:
        run(tmp_path, other.write_trident(tmp_path / "a.h5", spoilt, other.grid_coords(N, 512)))
    assert caught.value.code == "wrong_features"
    assert not (tmp_path / "embeddings" / "uni-imported" / "a.zarr").exists()


def test_what_does_not_fit(tmp_path: Path):
    coords = other.grid_coords(N, 512)
    good = other.write_trident(tmp_path / "a.h5", features(), coords)
    cases = [
        ("width 512, and uni gives 1024", other.write_trident(tmp_path / "w.h5", features(width=512), coords), {}),
        ("width 1024, and mine gives 7", good, {"encoder": "mine", "dim": 7}),
        ("one of 2 files", [str(good), str(tmp_path / "w.h5")], {}),
        ("no tile", other.write_trident(tmp_path / "n.h5", features(0), coords[:0]), {}),
        ("not finite", other.write_trident(tmp_path / "i.h5", features(), coords + np.nan), {}),
        ("there is no file", tmp_path / "absent.h5", {}),
        ("neither the sheet nor", [], {}),
    ]
    for words, path, options in cases:
        with pytest.raises(SlideFailure, match=words):
            run(tmp_path, path, **options)


def test_coordinates_with_fractions_are_rounded_and_said(tmp_path: Path):
    path = other.write_trident(tmp_path / "a.h5", features(), other.grid_coords(N, 512) + 0.4)
    assert "coordinates with fractions of a pixel were rounded" in run(tmp_path, path)["notes"]
    np.testing.assert_array_equal(stored(tmp_path)[1], other.grid_coords(N, 512))


def test_features_without_coordinates_are_features(tmp_path: Path):
    np.save(tmp_path / "a.npy", features())
    assert run(tmp_path, tmp_path / "a.npy")["coordinates"] is False
    np.testing.assert_array_equal(stored(tmp_path)[0], features())


def test_an_encoder_that_nobody_knows(tmp_path: Path):
    path = other.write_trident(tmp_path / "a.h5", features(width=7), other.grid_coords(N, 512))
    record = run(tmp_path, path, encoder="mine")
    assert record["tiles"] == N
    assert stored(tmp_path, encoder="mine-imported")[2]["encoder"]["dim"] == 7
    assert "did you mean uni2_h" in unknown_encoder({"encoder": "uni2h"}, registry())
    assert unknown_encoder({"encoder": "uni2_h"}, registry()) is None


def test_what_the_file_calls_its_encoder_is_compared(tmp_path: Path):
    about = {**other.STAMP_2, "extractor": "ctranspath"}
    path = other.write_stamp(tmp_path / "a.h5", features(), other.grid_coords(N, 256).astype(float), **about)
    assert any(
        "its encoder is ctranspath, and features.encoder says uni" in note for note in run(tmp_path, path)["notes"]
    )
    assert same_name("mahmood-uni", "uni")
    assert not same_name("conch", "uni")


def test_scales_are_not_mixed(tmp_path: Path):
    """20x and 10x of one encoder are two kinds of features."""
    from slidemake.core.failures import RunError

    run(tmp_path, other.write_trident(tmp_path / "a.h5", features(), other.grid_coords(N, 512)))
    slow = other.write_trident(tmp_path / "b.h5", features(), other.grid_coords(N, 1024), target_magnification=10)
    run(tmp_path, slow, slide="b")
    with pytest.raises(RunError, match="made in different ways"):
        load_bags(tmp_path / "embeddings" / "uni-imported", [("a", "p"), ("b", "q")])


def test_a_slide_that_is_not_there_is_no_failure(tmp_path: Path):
    def gone() -> dict[str, Any]:
        raise SlideFailure("missing_file", "there is no file x")

    record = screen_or_pass("a", gone, tmp_path)
    assert "missing_file" in record["absent"]
    assert screen_or_pass("a", None, tmp_path)["absent"] == "the sheet gives no file"
    assert screen_or_pass("a", lambda: {"fingerprint": "f"}, tmp_path) == {"fingerprint": "f"}
