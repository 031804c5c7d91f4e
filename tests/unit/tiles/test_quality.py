"""Quality scores of tiles against scikit-image, hand-made tiles, and real ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage as ndi
from slidemake.tiles.quality import NAMES, tile_quality
from slidemake.tissue.focus import focus


def test_focus_is_the_variance_of_the_laplacian():
    grey = np.random.default_rng(0).integers(0, 256, (50, 61), dtype=np.uint8)
    laplacian = ndi.laplace(grey.astype(float))[1:-1, 1:-1]
    assert focus(grey) == pytest.approx(laplacian.var(), rel=1e-4)
    assert focus(np.zeros((2, 9), np.uint8)) == 0
    assert focus(np.full((40, 40), 200, np.uint8)) == 0


def test_colour_scores_of_flat_tiles():
    colours = [(255, 255, 255), (0, 0, 0), (43, 94, 96), (30, 50, 180), (205, 20, 25), (200, 120, 170), (110, 70, 150)]
    tiles = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    scores = dict(zip(NAMES, tile_quality(tiles).T, strict=True))
    assert scores["pen"].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert scores["black"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert scores["brightness"] == pytest.approx([np.mean(colour) / 255 for colour in colours], abs=1e-6)
    assert scores["saturation"][5] == pytest.approx(80 / 200)
    assert (scores["focus"] == 0).all()


def test_shapes_and_dtypes():
    assert tile_quality(np.zeros((0, 224, 224, 3), np.uint8)).shape == (0, len(NAMES))
    found = tile_quality(np.zeros((2, 1, 1, 3), np.uint8))
    assert found.shape == (2, len(NAMES))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="uint8"):
        tile_quality(np.zeros((1, 8, 8, 3)))


def test_a_score_does_not_depend_on_the_batch():
    tiles = np.random.default_rng(1).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    together = tile_quality(tiles)
    assert np.array_equal(together, np.concatenate([tile_quality(tile[None]) for tile in tiles]))


@pytest.mark.skipif(
    not os.environ.get("SLIDEMAKE_TEST_DATA"), reason="SLIDEMAKE_TEST_DATA is not set: no real tiles to test on"
)
def test_real_tiles_blurred_tiles_and_pen():
    data = Path(os.environ["SLIDEMAKE_TEST_DATA"])
    paths = sorted((data / "tiles_colon" / "colon_aca").glob("*.jpeg"))[:40]
    tiles = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    blurred = ndi.gaussian_filter(tiles, (0, 2.5, 2.5, 0))
    sharp, soft = tile_quality(tiles), tile_quality(blurred)
    reference = np.median(sharp[:, 0])
    assert (soft[:, 0] < 0.25 * reference).mean() > 0.95
    assert (sharp[:, 0] < 0.25 * reference).mean() < 0.1
    assert np.percentile(sharp[:, NAMES.index("pen")], 95) < 0.02
    pen = np.asarray(Image.open(data / "images" / "tiles" / "no-tissue-green-pen.png").convert("RGB"))
    assert tile_quality(pen[None])[0, NAMES.index("pen")] > 0.4
