"""Tiles out of a slide, against brute force on an array in memory."""

import math

import numpy as np
import pytest
from PIL import Image
from slidemake.tiles.grid import parse_grid, plan_window, tile_positions
from slidemake.tiles.reading import RUN_TILES, read_tiles, resample


class ArraySlide:
    """A slide in memory with the reader's protocol; counts reads, and fails on a rectangle if asked."""

    def __init__(self, pixels, broken=None):
        self.pixels, self.broken, self.calls = pixels, broken, 0

    def jpeg_tiles(self, level, reduce=1):
        return None

    def read(self, x0, y0, level, w, h):
        assert level == 0
        self.calls += 1
        if self.broken is not None:
            bx, by, bw, bh = self.broken
            if x0 < bx + bw and bx < x0 + w and y0 < by + bh and by < y0 + h:
                raise OSError("corrupt JPEG data")
        out = np.full((h, w, 3), 255, np.uint8)
        part = self.pixels[max(y0, 0) : y0 + h, max(x0, 0) : x0 + w]
        out[max(-y0, 0) :, max(-x0, 0) :][: part.shape[0], : part.shape[1]] = part
        return out


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (80, 120, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((1200, 800), Image.Resampling.BICUBIC))


def test_native_tiles_are_crops_and_neighbours_share_a_read(pixels):
    slide = ArraySlide(pixels)
    window = plan_window(parse_grid("64px_0.5mpp"), 0.5, [1.0])
    coords = tile_positions(window, 1200, 800)
    tiles, good = read_tiles(slide, coords, window)
    assert good.all()
    expected = np.stack([pixels[y : y + 64, x : x + 64] for x, y in coords])
    np.testing.assert_array_equal(tiles, expected)
    per_row = -(-18 // RUN_TILES)
    assert slide.calls == 12 * per_row


@pytest.mark.parametrize("slide_mpp", [0.499, 0.25, 0.3, 0.2501])
def test_resampled_tiles_equal_pillows_antialiased_resize(pixels, slide_mpp):
    window = plan_window(parse_grid("64px_0.5mpp"), slide_mpp, [1.0])
    coords = tile_positions(window, 1200, 800)
    tiles, good = read_tiles(ArraySlide(pixels), coords, window)
    assert good.all()
    side = math.ceil(window.read_px)
    padded = np.pad(pixels, ((0, side), (0, side), (0, 0)), constant_values=255)
    for (x, y), tile in zip(coords, tiles, strict=True):
        region = Image.fromarray(padded[y : y + side, x : x + side])
        brute = region.resize((64, 64), Image.Resampling.BICUBIC, box=(0, 0, window.read_px, window.read_px))
        difference = np.abs(tile.astype(int) - np.asarray(brute))
        assert difference.max() <= 2  # the vectorised filter has weights of 16 bits
        assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize(("read_px", "side"), [(320.0, 224), (448.0, 224), (221.8, 224), (225.0001, 224), (98.0, 49)])
def test_resampling_gives_the_asked_size_whatever_the_rounding(read_px, side):
    regions = np.zeros((2, math.ceil(read_px), math.ceil(read_px), 3), np.uint8)
    assert resample(regions, (read_px, read_px), side).shape == (2, side, side, 3)


def test_overlapping_tiles(pixels):
    window = plan_window(parse_grid("64px_0.5mpp", 40), 0.5, [1.0])
    coords = tile_positions(window, 400, 150)
    tiles, _ = read_tiles(ArraySlide(pixels), coords, window)
    np.testing.assert_array_equal(tiles, np.stack([pixels[y : y + 64, x : x + 64] for x, y in coords]))


def test_a_corrupt_tile_costs_itself_alone(pixels):
    window = plan_window(parse_grid("64px_0.5mpp"), 0.5, [1.0])
    coords = tile_positions(window, 1200, 800)
    whole, _ = read_tiles(ArraySlide(pixels), coords, window)
    tiles, good = read_tiles(ArraySlide(pixels, broken=(70, 70, 10, 10)), coords, window)
    assert coords[~good].tolist() == [[64, 64]]
    np.testing.assert_array_equal(tiles[good], whole[good])


def test_no_tiles_is_legal(pixels):
    window = plan_window(parse_grid("64px_0.5mpp"), 0.5, [1.0])
    tiles, good = read_tiles(ArraySlide(pixels), np.zeros((0, 2), np.int32), window)
    assert tiles.shape == (0, 64, 64, 3)
    assert good.shape == (0,)
