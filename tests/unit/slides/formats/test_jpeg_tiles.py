"""Stored JPEG tiles: OpenSlide's pixels, each tile decoded once, damage told, reduced decoding measured."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import pyvips
from PIL import Image
from slidemake.slides.formats import jpeg_tiles
from slidemake.slides.opening import open_slide
from slidemake.tiles.grid import Grid, plan_window, tile_positions
from slidemake.tiles.reading import read_tiles, reduction

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real slides to read")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 x 700 px in JPEG tiles of 128 px, with detail at every scale."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(40, 230, (44, 63, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((1000, 700), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("jpeg") / "slide.tiff"
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb", xres=4000, yres=4000)
    image.tiffsave(str(path), tile=True, tile_width=128, tile_height=128, compression="jpeg", Q=85)
    return path


def touched(coords: np.ndarray, side: int, tile: int = 128, across: int = 8) -> set[int]:
    return {
        ty * across + tx
        for x, y in coords.tolist()
        for ty in range(y // tile, (y + side - 1) // tile + 1)
        for tx in range(x // tile, (x + side - 1) // tile + 1)
    }


def test_regions_equal_openslide_and_are_white_outside(slide: Path) -> None:
    rng = np.random.default_rng(1)
    with open_slide(slide, "pyvips") as reader, openslide.OpenSlide(slide) as reference:
        tiles = reader.jpeg_tiles(0)
        for _ in range(30):
            x, y, w, h = (int(v) for v in rng.integers((0, 0, 1, 1), (900, 600, 300, 300)))
            inside = np.asarray(reference.read_region((x, y), 0, (w, h)))
            expected = np.where(inside[..., 3:] > 0, inside[..., :3], 255)
            np.testing.assert_array_equal(tiles.read(x, y, w, h), expected)
        corner = tiles.read(-10, -20, 30, 40)
        assert (corner[:20] == 255).all()
        assert (corner[:, :10] == 255).all()
        np.testing.assert_array_equal(corner[20:, 10:], tiles.read(0, 0, 20, 20))
        assert (tiles.read(5000, 5000, 8, 8) == 255).all()


@pytest.mark.parametrize("threads", [1, 4])
def test_each_stored_tile_is_decoded_once_however_tiles_straddle_it(slide: Path, threads: int) -> None:
    window = plan_window(Grid("g", 56, 0.25, 56), 0.25, [1.0])
    coords = tile_positions(window, 1000, 700)
    with open_slide(slide, "pyvips") as reader, ThreadPoolExecutor(threads) as pool:
        parts = [coords[i : i + 7] for i in range(0, len(coords), 7)]
        results = list(pool.map(lambda part: read_tiles(reader, part, window)[0], parts))
        assert reader.jpeg_tiles(0).decoded == len(touched(coords, 56))
    with openslide.OpenSlide(slide) as reference:
        for (x, y), tile in zip(coords.tolist(), np.concatenate(results), strict=True):
            np.testing.assert_array_equal(tile, np.asarray(reference.read_region((x, y), 0, (56, 56)))[..., :3])


def test_the_cache_is_bounded_and_forgetting_changes_nothing(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slide, "pyvips") as reader:
        whole = reader.jpeg_tiles(0).read(0, 0, 1000, 700)
    monkeypatch.setattr(jpeg_tiles, "CACHE_BYTES", (1, 3 * 128 * 128 * 3))
    with open_slide(slide, "pyvips") as reader:
        tiles = reader.jpeg_tiles(0)
        np.testing.assert_array_equal(tiles.read(0, 0, 1000, 700), whole)
        np.testing.assert_array_equal(tiles.read(0, 0, 1000, 700), whole)
        assert len(tiles._tiles) <= 3
        assert tiles.decoded == 2 * 48


def test_a_damaged_tile_is_an_error_for_all_who_wait_and_costs_no_other(slide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged.tiff"
    with open_slide(slide, "pyvips") as reader:
        page = reader.jpeg_tiles(0).page
    data = bytearray(slide.read_bytes())
    middle = int(page.offsets[10] + page.counts[10] // 2)
    data[middle : middle + 400] = bytes(400)
    copy.write_bytes(bytes(data))
    window = plan_window(Grid("g", 64, 0.25, 64), 0.25, [1.0])
    coords = tile_positions(window, 1000, 700)
    with open_slide(copy, "pyvips") as reader, ThreadPoolExecutor(4) as pool:
        parts = [coords[i : i + 5] for i in range(0, len(coords), 5)]
        good = np.concatenate(list(pool.map(lambda part: read_tiles(reader, part, window)[1], parts)))
        with pytest.raises(OSError, match=r"tile \(2, 1\)"):
            reader.jpeg_tiles(0).decode(10)
    assert {tuple(c) for c in coords[~good].tolist()} == {(256, 128), (320, 128), (256, 192), (320, 192)}


@pytest.mark.parametrize(
    ("wanted", "reduce"),
    [(0.25, 1), (0.45, 1), (0.488, 1), (0.495, 2), (0.5, 2), (0.9, 2), (0.99, 4), (2.0, 8), (5, 8)],
)
def test_how_far_a_tile_is_decoded_smaller(slide: Path, wanted: float, reduce: int) -> None:
    window = plan_window(Grid("g", 32, wanted, 32), 0.25, [1.0])
    with open_slide(slide, "pyvips") as fast, open_slide(slide, "openslide") as slow:
        assert reduction(fast, window) == reduce
        assert reduction(slow, window) == 1


class Undivided:
    """A reader that decodes at full size: what reduced decoding is compared with."""

    def __init__(self, reader):
        self.read = reader.read

    def jpeg_tiles(self, level, reduce=1):
        return None


@real
@pytest.mark.parametrize("factor", [2, 4])
def test_reduced_decoding_is_as_close_to_a_full_decode_as_a_jpeg_of_quality_90(factor: int) -> None:
    """The measure is the default encoder's features, and grey levels; both sides have the same phase."""
    import torch
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import load_record, registry
    from slidemake.stores.jpeg_codec import decode_jpeg, encode_jpeg

    repo = Path(__file__).resolve().parents[4]
    record = load_record(
        "efficientnet_lite0", registry([repo / "scripts" / "slidemake" / "encoders" / "encoders.yaml"])
    )
    encoder = load_encoder(record, torch.device("cpu"), "fp32")

    def features(tiles: np.ndarray) -> np.ndarray:
        return encoder.forward(torch.from_numpy(tiles).permute(0, 3, 1, 2)).numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    with open_slide(Path(DATA or "") / "slides" / "cmu-1-small-region.svs", "pyvips") as reader:
        assert reader.mpp is not None
        window = plan_window(Grid("g", 224, reader.mpp * factor, 224), reader.mpp, [1.0])
        coords = tile_positions(window, *reader.dimensions)
        full, _ = read_tiles(Undivided(reader), coords, window)
        tissue = full.reshape(len(full), -1).mean(1) < 225
        full, coords = full[tissue][:6], coords[tissue][:6]
        assert reduction(reader, window) == factor
        reduced, good = read_tiles(reader, coords, window)
    assert good.all()
    difference = np.abs(full.astype(int) - reduced)
    assert difference.mean() < 2.5
    assert np.quantile(difference, 0.99) <= 14
    wanted = features(full)
    assert cosine(wanted, features(reduced)).mean() > 0.985
    recompressed = np.stack([decode_jpeg(encode_jpeg(tile, 90, "444")) for tile in full])
    assert cosine(wanted, features(reduced)).mean() > cosine(wanted, features(recompressed)).mean() - 0.01
