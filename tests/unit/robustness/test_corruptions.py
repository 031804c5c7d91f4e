"""Corruptions against their definitions."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb_from_hed
from slidemake.robustness.corruptions import SEVERITIES, corrupt


def noise(n=2, side=32):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", SEVERITIES)
def test_severity_grows_and_zero_is_nothing(kind):
    tiles = noise()
    assert corrupt(tiles, kind, 0, 0.5) is tiles
    changes = [np.abs(corrupt(tiles, kind, s, 0.5).astype(int) - tiles).mean() for s in (1, 2, 3)]
    assert 0 < changes[0] < changes[1] < changes[2] or kind == "scale"  # any shift of noise is as far as any other
    assert corrupt(tiles, kind, 3, 0.5).shape == tiles.shape
    assert len(corrupt(tiles[:0], kind, 3, 0.5)) == 0


def test_jpeg_is_pillows():
    tiles = noise(1)
    coded = io.BytesIO()
    Image.fromarray(tiles[0]).save(coded, "JPEG", quality=30, subsampling=2)
    np.testing.assert_array_equal(corrupt(tiles, "jpeg", 2, 0.5)[0], np.asarray(Image.open(coded)))


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_blur_has_the_given_width_in_micrometres(mpp):
    tiles = np.zeros((1, 65, 65, 3), np.uint8)
    tiles[0, 24:41, 24:41] = 255  # a square of 17 px: a single pixel would be rounded away
    found = corrupt(tiles, "blur", 3, mpp)[0, :, :, 0].astype(float)
    x = np.arange(65) - 32
    variance = (found * x[None] ** 2).sum() / found.sum()
    assert variance == pytest.approx((17**2 - 1) / 12 + (1.0 / mpp) ** 2, rel=0.02)


def test_brightness_is_a_factor():
    tiles = np.full((1, 4, 4, 3), 200, np.uint8)
    assert (corrupt(tiles, "brightness", 3, 0.5) == 130).all()


def test_stain_moves_haematoxylin_up_and_eosin_down():
    """Pixels mixed from known amounts come out as mixed from the changed amounts; glass stays glass."""
    amounts = np.array([[0.8, 0.3, 0.0], [0.2, 0.9, 0.0], [0.0, 0.0, 0.0]])
    mix = lambda a: np.exp(-a @ rgb_from_hed) * 256 - 1  # noqa: E731
    tiles = np.rint(mix(amounts)).astype(np.uint8).reshape(1, 1, 3, 3)
    found = corrupt(tiles, "stain", 3, 0.5).reshape(3, 3)
    np.testing.assert_allclose(found, mix(amounts * [1.5, 0.5, 1.0]), atol=2.5)
    assert (found[2] == 255).all()


def test_scale_keeps_the_middle_and_moves_the_rest_outwards():
    tiles = np.full((1, 60, 60, 3), 255, np.uint8)
    tiles[0, 28:32, 40:44] = 0  # 10 to 14 px right of the middle
    dark = np.flatnonzero(corrupt(tiles, "scale", 3, 0.5)[0, 30, :, 0] < 128)
    assert (dark.min() - 30, dark.max() + 1 - 30) == (15, 21)
