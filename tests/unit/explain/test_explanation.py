"""Scores per tile to pictures, QuPath objects, galleries and figures."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from shapely.geometry import box, shape
from sklearn.metrics import roc_auc_score
from slidemake.core.files import read_json
from slidemake.explain.explanation import (
    FILES,
    concentration,
    explain_slide,
    percentiles,
    rank_correlation,
    select_diverse,
    tile_auroc,
    tile_truth,
    write_geojson,
)
from slidemake.explain.pictures import font, length_text, overlay, render_heatmap, round_length, shortened, tile_raster

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")


def case(n: int = 30, seed: int = 0, tile: int = 100) -> dict:
    """A slide of 600 x 500 level-0 px seen at 1/4, with n tiles of 100 px in rows of six."""
    rng = np.random.default_rng(seed)
    coords = np.array([(tile * (i % 6), tile * (i // 6)) for i in range(n)], np.int32).reshape(-1, 2)
    return {
        "slide_id": "a <b> & c",
        "coords": coords,
        "tile_level0_px": (tile, tile),
        "features": rng.normal(size=(n, 8)),
        "attention": rng.random(n),
        "leave_one_out": rng.normal(size=n),
        "read_tiles": lambda indices: rng.integers(0, 255, (len(indices), 32, 32, 3)).astype(np.uint8),
        "overview": np.full((125, 150, 3), 230, np.uint8),
        "sx": 4.0,
        "sy": 4.0,
        "mpp": (0.5, 0.5),
    }


def test_percentiles_are_middle_ranks_and_nan_safe():
    assert percentiles([3.0, 1.0, 2.0, 4.0]).tolist() == [62.5, 12.5, 37.5, 87.5]
    assert percentiles([1.0, 1.0]).tolist() == [50, 50]
    assert percentiles([7.0]).tolist() == [50]
    assert percentiles([]).tolist() == []
    found = percentiles([np.nan, 1.0, 2.0])
    assert np.isnan(found[0])
    assert found[1:].tolist() == [25, 75]


def test_ten_copies_of_one_gland_fill_one_place():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(5, 16))
    kind = np.r_[np.zeros(10, int), [1, 2, 3, 4], np.zeros(86, int)]
    features = kinds[kind] + rng.normal(size=(100, 16)) * 0.01
    scores = np.linspace(1, 0, 100)
    chosen = select_diverse(scores, features, 5)
    assert sorted(kind[chosen]) == [0, 1, 2, 3, 4]
    assert chosen[0] == 0  # the best tile of all is always there
    assert (np.diff(scores[chosen]) < 0).all()
    np.testing.assert_array_equal(chosen, select_diverse(scores, features, 5))


@pytest.mark.parametrize(("n", "k", "expected"), [(0, 5, 0), (1, 5, 1), (5, 5, 5), (50, 5, 5)])
def test_diverse_selection_has_the_asked_size(n, k, expected):
    same = np.ones((n, 4))  # identical features: no clusters to tell apart
    assert len(set(select_diverse(np.arange(n), same, k).tolist())) == expected


def test_diverse_selection_never_takes_nan():
    scores = np.array([np.nan, 1.0, np.nan, 0.5])
    assert select_diverse(scores, np.eye(4), 3).tolist() == [1, 3]


def test_tile_truth_equals_polygon_areas():
    rng = np.random.default_rng(1)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:12, 8:21] = 255
    truth_box = box(8 * 16, 5 * 16, 21 * 16, 12 * 16)
    coords = rng.integers(-40, 480, (200, 2))
    found = tile_truth(mask, coords, (50, 70), 16)
    expected = [box(x, y, x + 50, y + 70).intersection(truth_box).area / 3500 for x, y in coords]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_tile_truth_from_a_file(tmp_path):
    mask = np.zeros((4, 4), np.uint8)
    mask[:, :2] = 255
    Image.fromarray(mask).save(tmp_path / "tumour.png")
    found = tile_truth(tmp_path / "tumour.png", np.array([[0, 0], [16, 0], [32, 0], [24, 0]]), (32, 32))
    assert found.tolist() == [1.0, 0.5, 0.0, 0.25]
    assert tile_truth(mask, np.empty((0, 2)), (32, 32)).tolist() == []


def test_tile_auroc_equals_scikit_learn():
    rng = np.random.default_rng(2)
    scores, truth = rng.random(50).round(1), rng.random(50)
    assert tile_auroc(scores, truth) == pytest.approx(roc_auc_score(truth > 0.5, scores))
    assert tile_auroc(scores, np.zeros(50)) is None


def test_raster_draws_squares_without_gaps_and_averages_overlap():
    coords = np.array([[0, 0], [10, 0], [20, 0]])
    raster = tile_raster(coords, (10, 10), np.array([1.0, 2.0, np.nan]), (4, 10), 3, 3)
    assert np.isfinite(raster[:3, :7]).all()  # 20 level-0 px are 6.7 px: no gap at 10 / 3
    assert set(np.unique(raster[:3, :7])) == {1.0, 2.0}
    assert np.isnan(raster[:, 7:]).all()  # a NaN score is not drawn
    assert np.isnan(raster[3:]).all()
    half = tile_raster(np.array([[0, 0], [5, 0]]), (10, 10), np.array([0.0, 1.0]), (10, 20), 1, 1)
    assert half[0, [0, 7, 12]].tolist() == [0.0, 0.5, 1.0]
    outside = tile_raster(np.array([[-50, -50], [95, 0]]), (10, 10), np.ones(2), (10, 10), 10, 10)
    assert np.isfinite(outside).sum() == 1


def test_the_hottest_place_of_the_picture_is_the_planted_tile():
    coords = np.array([(x, y) for y in range(0, 500, 100) for x in range(0, 600, 100)])
    raster = tile_raster(coords, (100, 100), percentiles((coords == (300, 200)).all(1)), (125, 150), 4, 4)
    rows, columns = np.nonzero(raster == raster.max())
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (75, 99, 50, 74)


def test_overlay_leaves_the_rest_alone_and_keeps_structure():
    picture = np.random.default_rng(0).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    percentile = np.full((6, 6), np.nan)
    percentile[:3] = 50
    mixed = overlay(picture, percentile)
    np.testing.assert_array_equal(mixed[3:], picture[3:])
    light = np.array([0.299, 0.587, 0.114])
    assert spearmanr((mixed[:3] @ light).ravel(), (picture[:3] @ light).ravel()).statistic > 0.97


@pytest.mark.parametrize("size", [(150, 125), (40, 400), (3000, 30)])
def test_heatmap_of_any_shape_fits_its_sheet(tmp_path, size):
    overview = np.full((size[1], size[0], 3), 200, np.uint8)
    place = {"sx": 8, "sy": 8, "mpp": 0.25, "title": "x" * 300}
    render_heatmap(overview, np.array([[0, 0]]), (100, 100), np.array([50.0]), tmp_path / "h.png", **place)
    with Image.open(tmp_path / "h.png") as picture:
        sheet = np.asarray(picture)
    assert 700 < sheet.shape[1] <= 1300
    assert sheet.shape[0] <= 1600
    for edge in (sheet[:6], sheet[-6:], sheet[:, :6], sheet[:, -6:]):
        assert (edge == 255).all()  # nothing is cut off


def test_words_and_lengths():
    assert [round_length(v) for v in (1, 1.99, 2, 4.9, 730, 0.03)] == [1, 1, 2, 2, 500, 0.02]
    assert [length_text(v) for v in (50, 1000, 2500)] == ["50 µm", "1 mm", "2.5 mm"]
    short = shortened("slide-with-a-long-name-0001", font(16), 120)
    assert short.startswith("slide")
    assert short.endswith("0001")
    assert font(16).getlength(short) <= 120


def test_geojson_is_valid_and_holds_the_tiles(tmp_path):
    coords = np.array([[0, 0], [100, 50]])
    values = {"attention": np.array([0.25, np.nan]), "attention_percentile": np.array([97.0, np.nan])}
    write_geojson(coords, (100, 50), values, tmp_path / "h.geojson")
    found = json.loads((tmp_path / "h.geojson").read_text(), parse_constant=pytest.fail)
    first, second = found["features"]
    assert shape(second["geometry"]).equals(box(100, 50, 200, 100))
    assert first["properties"]["objectType"] == "detection"
    assert first["properties"]["measurements"] == {"attention": 0.25, "attention_percentile": 97.0}
    assert first["properties"]["classification"]["name"] == "attention 95-100 %"
    assert second["properties"]["measurements"] == {}
    assert "classification" not in second["properties"]


def test_concentration_and_rank_correlation():
    assert concentration(np.full(20, 0.05)) == pytest.approx({"top_tenth_share": 0.1, "effective_tiles": 20})
    assert concentration(np.array([1.0, 0.0]))["effective_tiles"] == pytest.approx(1)
    assert concentration(np.empty(0)) == {"top_tenth_share": None, "effective_tiles": None}
    a, b = np.random.default_rng(0).random((2, 30)).round(1)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, np.full(30, np.nan)) is None
    assert rank_correlation(a, np.ones(30)) is None


def test_explain_slide_writes_everything(tmp_path):
    given = case()
    truth = (np.arange(30) < 6).astype(float)
    record = explain_slide(tmp_path / "x", **given, truth=truth, k=4, facts={"fingerprint": "f"})
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted(FILES)
    rows = list(csv.DictReader((tmp_path / "x" / "scores.csv").open()))
    assert list(rows[0]) == ["tile", "x", "y", "attention", "attention_percentile", "leave_one_out", "tumour"]
    np.testing.assert_allclose([float(r["attention"]) for r in rows], given["attention"], rtol=1e-6)
    assert [[int(r["x"]), int(r["y"])] for r in rows] == given["coords"].tolist()
    assert record == read_json(tmp_path / "x" / "explain.json")
    assert record["tile_auroc"] == pytest.approx(roc_auc_score(truth, given["attention"]))
    assert (len(record["top"]), len(record["bottom"]), record["fingerprint"]) == (4, 4, "f")
    assert not set(record["top"]) & set(record["bottom"])
    assert record["top"][0] == given["attention"].argmax()
    assert record["bottom"][0] == given["attention"].argmin()
    with Image.open(tmp_path / "x" / "heatmap.png") as picture:
        assert 1200 <= picture.width <= 1300


def test_same_input_same_bytes(tmp_path):
    for name in "ab":
        explain_slide(tmp_path / name, **case())
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("n", [0, 1])
def test_no_tile_and_one_tile_are_legal(tmp_path, n):
    for mpp in ((0.5, 0.5), None):
        record = explain_slide(tmp_path / "x", **{**case(n), "mpp": mpp}, truth=np.zeros(n))
        assert record["tiles"] == n
        assert len(record["top"]) == n
        assert record["bottom"] == []
        assert record["tile_auroc"] is None
        assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted(FILES)


def test_scores_that_are_nan(tmp_path):
    given = case(6)
    given["attention"][2] = np.nan
    record = explain_slide(tmp_path / "x", **{**given, "leave_one_out": None})
    assert record["without_score"] == 1
    assert 2 not in record["top"] + record["bottom"]
    assert "NaN" not in (tmp_path / "x" / "heatmap.geojson").read_text()
    nothing = explain_slide(tmp_path / "y", **{**given, "attention": np.full(6, np.nan)})
    assert nothing["top"] == []


def test_arrays_of_other_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="30 tiles, but 29 attention"):
        explain_slide(tmp_path, **{**case(), "attention": np.zeros(29)})


@pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real slide to draw on")
def test_heatmap_on_a_real_slide_keeps_the_tissue_visible(tmp_path):
    import openslide

    with openslide.OpenSlide(Path(DATA) / "slides" / "cmu-1-small-region.svs") as slide:
        width, height = slide.dimensions
        overview = np.asarray(slide.get_thumbnail((600, 800)).convert("RGB"))
    coords = np.array([(x, y) for y in range(0, height - 224, 224) for x in range(0, width - 224, 224)])
    sx, sy = width / overview.shape[1], height / overview.shape[0]
    raster = tile_raster(coords, (224, 224), np.full(len(coords), 80.0), overview.shape[:2], sx, sy)
    mixed, covered = overlay(overview, raster), np.isfinite(raster)
    light = np.array([0.299, 0.587, 0.114])
    before, after = (overview @ light)[covered], (mixed @ light)[covered]
    assert np.corrcoef(before, after)[0, 1] > 0.97
    assert after.std() > 0.4 * before.std()
