"""Between tissue masks and polygons, and the share of a tile that is tissue.

GeoJSON holds polygons with holes in level-0 pixels, one Feature per piece of tissue, in the form QuPath imports and
exports; an edited file can be given back in the sheet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry import Polygon, shape
from skimage.measure import find_contours

from slidemake.core.failures import SlideFailure

HINT = "Export the outline from QuPath as GeoJSON (polygons in level-0 pixels), or empty the tissue_geojson cell."


def mask_polygons(mask: np.ndarray, scale: tuple[float, float], tolerance_px: float = 0.0) -> list[Polygon]:
    """Polygons, with holes, around the True pixels of `mask` (h, w) bool, in level-0 pixels, largest first.

    scale: level-0 px per mask px in x and y. Lines run half-way between pixel centres, so `polygons_mask` gives the
    mask back exactly when `tolerance_px` (of simplification, in mask px) is 0.
    """
    padded = np.pad(mask.astype(np.float32), 1)
    rings = [ring for ring in find_contours(padded, 0.5, fully_connected="high") if len(ring) >= 4]
    if not rings:
        return []
    factors = np.array([scale[0], scale[1]], float)
    lines = [shapely.linestrings((ring[:, ::-1] - 0.5) * factors) for ring in rings]
    # Nested rings alternate between tissue and hole; GEOS resolves islands in holes as well.
    area = shapely.build_area(shapely.geometrycollections(lines))
    # Tolerance 0 drops the points in the middle of straight lines only.
    area = area.simplify(tolerance_px * float(factors.min()), preserve_topology=True)
    pieces = [piece for piece in _polygons(area) if piece.area > 0]
    return sorted(pieces, key=lambda piece: (-piece.area, piece.bounds))


def _polygons(geometry: Any) -> list[Polygon]:
    """The polygons in a geometry of any type; points and lines have no area and are dropped."""
    if isinstance(geometry, Polygon):
        return [] if geometry.is_empty else [geometry]
    return [piece for part in getattr(geometry, "geoms", ()) for piece in _polygons(part)]


def polygons_geojson(polygons: list[Polygon], mpp: float) -> dict[str, Any]:
    """A FeatureCollection that QuPath imports as editable annotations of class Tissue."""
    features = []
    for number, polygon in enumerate(polygons, start=1):
        rings = [polygon.exterior, *sorted(polygon.interiors, key=lambda ring: ring.bounds)]
        coordinates = [np.round(np.asarray(ring.coords)[:, :2], 2).tolist() for ring in rings]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": coordinates},
                "properties": {
                    "objectType": "annotation",
                    "name": f"Tissue {number}",
                    "classification": {"name": "Tissue", "color": [0, 200, 0]},
                    "isLocked": False,
                    "area_mm2": round(polygon.area * mpp**2 / 1e6, 6),
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def read_geojson(path: str | Path) -> list[Polygon]:
    """Polygons of a GeoJSON file: FeatureCollection, Feature, geometry, or a list of Features; level-0 pixels.

    Invalid polygons (crossing lines) are repaired, overlapping ones joined, and areas whose class QuPath calls ignored
    (its name ends in `*`) are cut out. Raises SlideFailure, which names the file, when it is absent or says nothing.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SlideFailure("missing_file", f"tissue outline {path} does not exist", HINT) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SlideFailure("unreadable", f"tissue outline {path} is not valid JSON: {error}", HINT) from error
    wanted: list[Polygon] = []
    ignored: list[Polygon] = []
    for number, (geometry, class_name) in enumerate(_geometries(content, path), start=1):
        try:
            polygons = _polygons(shapely.make_valid(shape(geometry)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
            message = f"tissue outline {path}: feature {number} is not a GeoJSON geometry ({error})"
            raise SlideFailure("unreadable", message, HINT) from error
        for polygon in polygons:
            if not np.isfinite(polygon.bounds).all():
                raise SlideFailure("unreadable", f"tissue outline {path}: feature {number} is not finite", HINT)
        (ignored if class_name.endswith("*") else wanted).extend(polygons)
    if not wanted and content != {} and _count(content):
        raise SlideFailure("unreadable", f"tissue outline {path} has features but no polygon with an area", HINT)
    area = shapely.union_all(wanted).difference(shapely.union_all(ignored))
    return sorted(_polygons(area), key=lambda piece: (-piece.area, piece.bounds))


def _count(content: Any) -> int:
    return len(content.get("features", [content])) if isinstance(content, dict) else len(content)


def _geometries(content: Any, path: str | Path) -> list[tuple[Any, str]]:
    """(geometry, class name) of everything in a GeoJSON object."""
    if isinstance(content, list):
        return [pair for item in content for pair in _geometries(item, path)]
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection" and isinstance(content.get("features"), list):
        return _geometries(content["features"], path)
    if kind == "Feature":
        if content.get("geometry") is None:
            return []
        classification = (content.get("properties") or {}).get("classification")
        name = classification.get("name") if isinstance(classification, dict) else classification
        return [(content["geometry"], str(name or ""))]
    if kind in (
        "Polygon",
        "MultiPolygon",
        "GeometryCollection",
        "LineString",
        "MultiLineString",
        "Point",
        "MultiPoint",
    ):
        return [(content, "")]
    found = kind if isinstance(content, dict) else type(content).__name__
    raise SlideFailure("unreadable", f"tissue outline {path} is not GeoJSON: it holds {found!r}", HINT)


def polygons_mask(polygons: list[Polygon], shape_px: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """(h, w) bool: mask pixels whose centre lies in a polygon (level-0 px). Polygons must not overlap.

    Even-odd scanlines: every edge toggles what lies to the right of where it crosses a row's centre.
    """
    h, w = shape_px
    toggles = np.zeros((h, w + 1), np.uint8)
    for ring in (ring for polygon in polygons for ring in (polygon.exterior, *polygon.interiors)):
        points = np.asarray(ring.coords)[:, :2] / np.asarray(scale, float)
        start, end = points[:-1].copy(), points[1:].copy()
        swap = start[:, 1] > end[:, 1]
        start[swap], end[swap] = end[swap].copy(), start[swap].copy()
        first = np.clip(np.ceil(start[:, 1] - 0.5), 0, h).astype(np.int64)
        last = np.clip(np.ceil(end[:, 1] - 0.5), 0, h).astype(np.int64)  # exclusive: a shared vertex counts once
        rows_per_edge = last - first
        edge = np.repeat(np.arange(len(start)), rows_per_edge)
        offset = np.arange(len(edge)) - np.repeat(np.cumsum(rows_per_edge) - rows_per_edge, rows_per_edge)
        row = first[edge] + offset
        along = (row + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
        crossing = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
        column = np.clip(np.ceil(crossing - 0.5), 0, w).astype(np.int64)
        np.add.at(toggles, (row, column), 1)
    return (np.cumsum(toggles[:, :w], axis=1, dtype=np.uint8) & 1).astype(bool)


def tissue_fractions(mask: np.ndarray, scale: tuple[float, float], boxes: np.ndarray) -> np.ndarray:
    """(N,) float32: share of each box that is tissue, exact for boxes that cut mask pixels.

    mask (h, w) bool; scale: level-0 px per mask px in x and y; boxes (N, 4): x, y, width, height in level-0 px. What
    lies outside the mask is not tissue. The integral of a piecewise constant mask is bilinear between the corners of
    its pixels, so four look-ups in the integral image with fractional corners give the exact area.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    h, w = mask.shape
    integral = np.zeros((h + 1, w + 1), np.int64)
    np.cumsum(mask, axis=0, dtype=np.int64, out=integral[1:, 1:])
    np.cumsum(integral[1:, 1:], axis=1, out=integral[1:, 1:])
    x0, y0 = boxes[:, 0] / scale[0], boxes[:, 1] / scale[1]
    x1, y1 = (boxes[:, 0] + boxes[:, 2]) / scale[0], (boxes[:, 1] + boxes[:, 3]) / scale[1]

    def total(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.clip(x, 0, w), np.clip(y, 0, h)
        column, row = np.minimum(x.astype(np.int64), w - 1), np.minimum(y.astype(np.int64), h - 1)
        dx, dy = x - column, y - row
        upper = integral[row, column] * (1 - dx) + integral[row, column + 1] * dx
        lower = integral[row + 1, column] * (1 - dx) + integral[row + 1, column + 1] * dx
        return upper * (1 - dy) + lower * dy

    area = (x1 - x0) * (y1 - y0)
    inside = total(x1, y1) - total(x0, y1) - total(x1, y0) + total(x0, y0)
    return np.clip(np.divide(inside, area, out=np.zeros_like(area), where=area > 0), 0, 1).astype(np.float32)
