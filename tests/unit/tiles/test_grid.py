"""Grids against hand-computed positions."""

import numpy as np
import pytest
from slidemake.core.failures import RunError, SlideFailure
from slidemake.tiles.grid import parse_grid, plan_window, tile_positions


def test_names_are_parsed():
    assert parse_grid("224px_0.5mpp").tile_um == 112.0
    assert parse_grid("256px_1mpp", 128).stride_px == 128
    with pytest.raises(RunError, match="<tile>px_<mpp>mpp"):
        parse_grid("20x")


def test_native_level_is_read_without_resampling():
    window = plan_window(parse_grid("224px_0.5mpp"), 0.5, [1.0, 2.0, 4.0])
    assert (window.level, window.scale, window.resampled, window.tile_level0) == (0, 1.0, False, 224.0)


@pytest.mark.parametrize("downsample", [1.99995, 2.0, 2.0005, 2.001])
def test_levels_with_odd_downsamples_are_not_truncated(downsample):
    window = plan_window(parse_grid("224px_0.5mpp"), 0.25, [1.0, downsample, 4 * downsample / 2])
    assert window.level == 1
    assert window.read_px == pytest.approx(224 * 2 / downsample)
    assert window.tile_level0 == pytest.approx(448)
    assert window.effective_mpp == pytest.approx(0.5)


def test_a_level_that_is_too_coarse_is_not_used():
    window = plan_window(parse_grid("224px_0.5mpp"), 0.25, [1.0, 2.1])
    assert window.level == 0
    assert window.scale == pytest.approx(2.0)


def test_exact_mpp_is_resampled_and_tolerance_takes_pixels_as_they_are():
    exact = plan_window(parse_grid("224px_0.5mpp"), 0.499, [1.0])
    assert exact.resampled
    assert exact.effective_mpp == 0.5
    assert exact.tile_level0 == pytest.approx(224 * 0.5 / 0.499)
    near = plan_window(parse_grid("224px_0.5mpp"), 0.499, [1.0], tolerance=0.01)
    assert not near.resampled
    assert near.effective_mpp == 0.499


def test_a_coarse_scan_is_refused_beyond_five_percent():
    plan_window(parse_grid("224px_0.5mpp"), 0.52, [1.0])
    with pytest.raises(SlideFailure, match=r"0\.53 um/px") as caught:
        plan_window(parse_grid("224px_0.5mpp"), 0.53, [1.0])
    assert caught.value.code == "too_coarse"


def test_positions_do_not_drift_and_stay_inside():
    window = plan_window(parse_grid("224px_0.5mpp"), 0.2528, [1.0, 4.0])
    coords = tile_positions(window, 100_000, 2_000)
    xs = np.unique(coords[:, 0])
    exact = 224 * 0.5 / 0.2528  # 443.0379...
    assert np.abs(xs - np.arange(len(xs)) * exact).max() <= 0.5
    assert xs[-1] + exact <= 100_000.5
    assert xs[-1] + 2 * exact > 100_000
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    np.testing.assert_array_equal(order, np.arange(len(coords)))  # row-major


def test_overlap_bounds_and_small_slides():
    window = plan_window(parse_grid("100px_1mpp", 50), 1.0, [1.0])
    assert tile_positions(window, 200, 100).tolist() == [[0, 0], [50, 0], [100, 0]]
    assert tile_positions(window, 1000, 1000, (300, 500, 120, 100)).tolist() == [[300, 500]]
    assert tile_positions(window, 16, 16).shape == (0, 2)
