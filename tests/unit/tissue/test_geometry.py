"""Masks to polygons and back, outlines from files, and tissue fractions against brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage as ndi
from shapely.geometry import Polygon, shape
from slidemake.core.failures import SlideFailure
from slidemake.tissue.geometry import mask_polygons, polygons_geojson, polygons_mask, read_geojson, tissue_fractions


def blobs(seed: int, shape_px: tuple[int, int] = (120, 150)) -> np.ndarray:
    return ndi.gaussian_filter(np.random.default_rng(seed).standard_normal(shape_px), 3) > 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (16.0, 16.0), (7.97, 8.03)])
def test_polygons_and_back_is_the_same_mask(seed, scale):
    mask = blobs(seed)
    assert np.array_equal(polygons_mask(mask_polygons(mask, scale), mask.shape, scale), mask)


def test_noise_with_islands_in_holes_survives():
    mask = np.random.default_rng(9).random((60, 60)) > 0.5
    assert np.array_equal(polygons_mask(mask_polygons(mask, (4, 4)), mask.shape, (4, 4)), mask)
    rings = np.hypot(*(np.mgrid[:101, :101] - 50))
    target = (rings < 45) & ~((rings > 15) & (rings < 30))
    pieces = mask_polygons(target, (2, 2))
    assert [len(piece.interiors) for piece in pieces] == [1, 0]
    assert np.array_equal(polygons_mask(pieces, target.shape, (2, 2)), target)


def test_full_and_empty_masks():
    assert mask_polygons(np.zeros((5, 5), bool), (2, 2)) == []
    (whole,) = mask_polygons(np.ones((5, 8), bool), (2, 3))
    assert whole.bounds == (0, 0, 16, 15)
    assert polygons_mask([whole], (5, 8), (2, 3)).all()
    assert not polygons_mask([], (5, 8), (2, 3)).any()


def test_rasterising_is_a_point_in_polygon_test():
    import shapely

    rng = np.random.default_rng(2)
    star = Polygon(
        [
            (50 + r * np.cos(t), 40 + r * np.sin(t))
            for t, r in zip(np.linspace(0, 6, 30), rng.uniform(9, 45, 30), strict=True)
        ]
    )
    x, y = np.meshgrid(np.arange(100) + 0.5, np.arange(80) + 0.5)
    assert np.array_equal(polygons_mask([star], (80, 100), (1, 1)), shapely.contains_xy(star, x, y))


def test_polygons_beyond_the_slide_are_cut():
    big = Polygon([(-100, -100), (1000, -100), (1000, 1000), (-100, 1000)])
    assert polygons_mask([big], (6, 9), (10, 10)).all()


def test_geojson_is_what_qupath_imports(tmp_path):
    mask = blobs(1)
    collection = polygons_geojson(mask_polygons(mask, (16, 16)), 0.5)
    feature = collection["features"][0]
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert all(shape(item["geometry"]).is_valid for item in collection["features"])
    areas = [item["properties"]["area_mm2"] for item in collection["features"]]
    assert areas == sorted(areas, reverse=True)
    path = tmp_path / "x.geojson"
    path.write_text(json.dumps(collection))
    assert np.array_equal(polygons_mask(read_geojson(path), mask.shape, (16, 16)), mask)


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]


@pytest.mark.parametrize(
    ("content", "area"),
    [
        ({"type": "Polygon", "coordinates": [SQUARE, HOLE]}, 96),
        ({"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]}, 96),
        ({"type": "Feature", "properties": None, "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}, 100),
        ([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}], 100),
        ({"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]}, 100),
        # a bow tie is repaired to its two triangles
        ({"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}, 50),
        # the same square twice is joined, not toggled
        (
            {
                "type": "FeatureCollection",
                "features": [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}] * 2,
            },
            100,
        ),
        (
            {
                "type": "FeatureCollection",
                "features": [
                    {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}},
                    {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}},
                    {
                        "type": "Feature",
                        "properties": {"classification": {"name": "Ignore*"}},
                        "geometry": {"type": "Polygon", "coordinates": [HOLE]},
                    },
                ],
            },
            96,
        ),
        ({"type": "FeatureCollection", "features": []}, 0),
    ],
)
def test_outlines_of_every_form(tmp_path, content, area):
    path = tmp_path / "outline.geojson"
    path.write_text(json.dumps(content))
    assert sum(polygon.area for polygon in read_geojson(path)) == pytest.approx(area)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "3",
        '{"type": "Topology"}',
        '{"type": "Polygon"}',
        '{"type": "Polygon", "coordinates": [[[0, 0], ["a", 1], [1, 1], [0, 0]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}',
        '{"type": "Point", "coordinates": [1, 1]}',
        '{"type": "Feature", "geometry": {"type": "Circle"}}',
        '{"features": []}',
    ],
)
def test_broken_outlines_are_named(tmp_path, text):
    path = tmp_path / "broken.geojson"
    path.write_text(text)
    with pytest.raises(SlideFailure, match=r"broken\.geojson") as raised:
        read_geojson(path)
    assert raised.value.code == "unreadable"
    with pytest.raises(SlideFailure) as raised:
        read_geojson(tmp_path / "absent.geojson")
    assert raised.value.code == "missing_file"


def brute_force(mask: np.ndarray, scale: tuple[float, float], box: np.ndarray) -> float:
    total = 0.0
    x0, y0, x1, y1 = box[0] / scale[0], box[1] / scale[1], (box[0] + box[2]) / scale[0], (box[1] + box[3]) / scale[1]
    for row, column in zip(*np.nonzero(mask), strict=True):
        total += max(0, min(x1, column + 1) - max(x0, column)) * max(0, min(y1, row + 1) - max(y0, row))
    return total / ((x1 - x0) * (y1 - y0))


@pytest.mark.parametrize("scale", [(16.0, 16.0), (15.97, 16.04), (0.7, 1.3)])
def test_tissue_fractions_are_those_of_brute_force(scale):
    rng = np.random.default_rng(5)
    mask = blobs(6, (30, 37))
    size = np.array([37 * scale[0], 30 * scale[1]])
    corners = rng.uniform(-0.2, 1.1, (60, 2)) * size
    boxes = np.concatenate([corners, rng.uniform(0.01, 0.4, (60, 2)) * size], axis=1)
    expected = [brute_force(mask, scale, box) for box in boxes]
    found = tissue_fractions(mask, scale, boxes)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)


def test_tissue_fractions_of_whole_and_no_tiles():
    mask = np.ones((4, 4), bool)
    boxes = np.array([[0, 0, 8, 8], [-4, 0, 8, 8], [100, 0, 8, 8], [3, 3, 0, 0]])
    assert tissue_fractions(mask, (2, 2), boxes).tolist() == [1, 0.5, 0, 0]
    assert tissue_fractions(mask, (2, 2), np.zeros((0, 4))).shape == (0,)


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    path = tmp_path / "bom.geojson"
    path.write_text('{"type": "Polygon", "coordinates": [[[0, 0], [4, 0], [4, 4], [0, 0]]]}', encoding="utf-8-sig")
    assert [polygon.area for polygon in read_geojson(path)] == [8.0]
