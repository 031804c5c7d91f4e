"""The tiling stage on drawn slides: Dask shards, corrupt tiles, codecs, stores that are found again."""

from pathlib import Path

import numpy as np
import pytest
import pyvips
import zarr
from PIL import Image
from slidemake.core.failures import SlideFailure
from slidemake.core.files import read_json, write_json
from slidemake.stores.tile_store import TileStore, shard_path
from slidemake.tiles.grid import parse_grid
from slidemake.tiles.quality import NAMES
from slidemake.tiles.stage import process_slide

GRID = parse_grid("64px_0.5mpp")
OPTIONS = {
    "store": "pixels",
    "codec": "zstd",
    "jpeg_quality": 90,
    "jpeg_subsampling": "444",
    "pixels": "scanned",
    "min_tissue": 0.5,
    "min_tiles": 1,
    "shard_tiles": 8,
    "mpp_tolerance": 0.0,
}


@pytest.fixture
def slide(tmp_path):
    """A 512 x 384 px slide at 0.5 um/px whose left half is tissue, as screening and tissue detection leave it."""
    rng = np.random.default_rng(3)
    small = rng.integers(90, 230, (48, 64, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC))
    path = tmp_path / "slide.tiff"
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb", xres=2000, yres=2000)
    options = {"tile": True, "tile_width": 128, "tile_height": 128, "pyramid": True, "compression": "jpeg", "Q": 90}
    image.tiffsave(str(path), **options)
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :32] = 255
    folder = tmp_path / "results" / "slides" / "s"
    folder.mkdir(parents=True)
    Image.fromarray(mask).save(folder / "tissue.png")
    write_json(folder / "tissue.json", {"level0_per_mask_px": [8.0, 8.0]})
    described = {"path": str(path), "reader": "openslide", "width": 512, "height": 384, "bounds": None}
    levels = [{"downsample": 1.0}, {"downsample": 2.0}]
    write_json(
        folder / "slide.json", {**described, "mpp": 0.5, "mpp_source": "file", "identity": "i", "levels": levels}
    )
    return path


def run(tmp_path, grid=GRID, record=None, **changes):
    record = record or {"slide_id": "s", "fingerprint": "t"}
    return process_slide(record, grid, tmp_path / "results", {**OPTIONS, **changes}, threads=2)


def store_of(tmp_path, grid=GRID):
    return TileStore(tmp_path / "results" / "tiles" / grid.name / "s.zarr")


def test_tiles_of_the_tissue_as_openslide_reads_them(slide, tmp_path):
    import openslide

    figures = run(tmp_path)
    store = store_of(tmp_path)
    expected = [(x, y) for y in range(0, 384, 64) for x in range(0, 256, 64)]
    assert store.coords.tolist() == [list(c) for c in expected]
    assert figures["tiles"] == len(expected) == 24
    assert (store.tissue == 1).all()
    with openslide.OpenSlide(slide) as reader:
        for (x, y), tile in zip(expected, store.read(0, len(store)), strict=True):
            np.testing.assert_array_equal(tile, np.asarray(reader.read_region((x, y), 0, (64, 64)).convert("RGB")))
    attrs = store.attrs
    assert attrs["mpp"] == {"requested": 0.5, "effective": 0.5, "slide": 0.5, "source": "file"}
    assert attrs["tile_level0_px"] == [64.0, 64.0]
    assert attrs["quality_names"] == list(NAMES)
    assert store.quality.shape == (24, len(NAMES))
    assert len(list((store.path / "pixels" / "c").iterdir())) == 3  # 24 tiles in shards of 8
    assert attrs["refused"] == {"tissue": 0, "corrupt": 0}


def test_a_finished_store_is_found_and_a_change_makes_it_anew(slide, tmp_path):
    first = run(tmp_path)
    inode = store_of(tmp_path).path.stat().st_ino
    again = run(tmp_path)
    assert again.pop("reused") is True
    assert again == first
    assert store_of(tmp_path).path.stat().st_ino == inode
    assert "reused" not in run(tmp_path, codec="jpeg")
    assert "reused" not in run(tmp_path, record={"slide_id": "s", "fingerprint": "other tissue"})


def test_the_store_does_not_depend_on_threads(slide, tmp_path):
    run(tmp_path)
    bytes_of = {p.name: p.read_bytes() for p in [shard_path(store_of(tmp_path).path, k) for k in range(3)]}
    record = {"slide_id": "s", "fingerprint": "t"}
    for scheduler in ("synchronous", "threads"):
        store_of(tmp_path).path.rename(tmp_path / f"old-{scheduler}")
        process_slide(record, GRID, tmp_path / "results", OPTIONS, threads=1, scheduler=scheduler)
        again = {p.name: p.read_bytes() for p in [shard_path(store_of(tmp_path).path, k) for k in range(3)]}
        assert again == bytes_of


def test_coordinates_alone_are_the_same_coordinates(slide, tmp_path):
    run(tmp_path)
    coords, quality = store_of(tmp_path).coords, store_of(tmp_path).quality
    run(tmp_path, store="coords")
    store = store_of(tmp_path)
    np.testing.assert_array_equal(store.coords, coords)
    np.testing.assert_array_equal(store.quality, quality)
    assert not (store.path / "pixels").exists()
    assert not store.has_pixels


class Damaged:
    """An open slide whose data are corrupt around one point."""

    def __init__(self, inner, x, y):
        self.inner, self.x, self.y = inner, x, y

    def read(self, x0, y0, level, w, h):
        if x0 <= self.x < x0 + w and y0 <= self.y < y0 + h:
            raise OSError("corrupt JPEG data")
        return self.inner.read(x0, y0, level, w, h)

    def jpeg_tiles(self, level, reduce=1):
        return None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.inner.close()


def test_a_corrupt_tile_is_left_out_and_counted(slide, tmp_path, monkeypatch):
    import slidemake.slides.opening as reader_module

    run(tmp_path)
    whole = store_of(tmp_path)
    coords, pixels = whole.coords, whole.read(0, len(whole))
    plain = reader_module.open_slide
    monkeypatch.setattr(reader_module, "open_slide", lambda *a, **k: Damaged(plain(*a, **k), 70, 130))
    figures = run(tmp_path, record={"slide_id": "s", "fingerprint": "damaged"})
    store = store_of(tmp_path)
    keep = ~((coords == [64, 128]).all(1))
    assert figures["corrupt"] == 1
    assert store.attrs["refused"]["corrupt"] == 1
    np.testing.assert_array_equal(store.coords, coords[keep])
    np.testing.assert_array_equal(store.read(0, len(store)), pixels[keep])
    np.testing.assert_array_equal(zarr.open_group(store.path)["pixels"][...], pixels[keep])


def test_mostly_corrupt_is_unreadable(slide, tmp_path, monkeypatch):
    import slidemake.slides.opening as reader_module

    class Broken(Damaged):
        def read(self, *where):
            raise OSError("corrupt")

    plain = reader_module.open_slide
    monkeypatch.setattr(reader_module, "open_slide", lambda *a, **k: Broken(plain(*a, **k), 0, 0))
    with pytest.raises(SlideFailure, match="24 of 24") as caught:
        run(tmp_path)
    assert caught.value.code == "unreadable"
    assert list((tmp_path / "results" / "tiles" / GRID.name).iterdir()) == []


def test_too_few_tiles_and_none_at_all(slide, tmp_path):
    with pytest.raises(SlideFailure, match="min_tiles asks for 25") as caught:
        run(tmp_path, min_tiles=25)
    assert caught.value.code == "too_few_tiles"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "results" / "slides" / "s" / "tissue.png")
    assert run(tmp_path, min_tiles=0)["tiles"] == 0
    store = store_of(tmp_path)
    assert store.read(0, 0).shape == (0, 64, 64, 3)
    assert zarr.open_group(store.path)["pixels"].shape == (0, 64, 64, 3)


def test_a_coarser_grid_is_read_from_the_pyramid(slide, tmp_path):
    grid = parse_grid("64px_1mpp")
    run(tmp_path, grid)
    store = store_of(tmp_path, grid)
    assert store.attrs["level"] == 1
    assert store.attrs["resampling"] == "none"
    assert store.coords.tolist() == [[0, 0], [128, 0], [0, 128], [128, 128], [0, 256], [128, 256]]


def test_normalised_pixels_are_the_scanned_ones_normalised(slide, tmp_path):
    from slidemake.stain.fit import StainTransform, apply_stain_numpy

    run(tmp_path)
    scanned = store_of(tmp_path).read(0, 24)
    matrix = ((0.8, 0.1, 0.0), (0.0, 0.9, 0.1), (0.1, 0.0, 0.7))
    white = (250.0, 250.0, 250.0)
    transform = StainTransform("macenko", "ok", "hash", None, white, (255.0,) * 3, matrix)
    record = {"slide_id": "s", "fingerprint": "t"}
    options = {**OPTIONS, "pixels": "normalised"}
    process_slide(record, GRID, Path(tmp_path / "results"), options, stain=transform.as_dict())
    stored = store_of(tmp_path)
    np.testing.assert_array_equal(stored.read(0, 24), apply_stain_numpy(scanned, transform))
    assert stored.attrs["stain"]["fingerprint"] == transform.as_dict()["fingerprint"]


def use_vips(tmp_path):
    path = tmp_path / "results" / "slides" / "s" / "slide.json"
    write_json(path, {**read_json(path), "reader": "pyvips"})


def test_where_the_grid_is_the_scanners_own_its_bytes_are_kept(slide, tmp_path):
    import openslide
    from slidemake.slides.opening import open_slide

    use_vips(tmp_path)
    grid = parse_grid("128px_0.5mpp")
    run(tmp_path, grid, codec="jpeg")
    store = store_of(tmp_path, grid)
    assert store.attrs["codec"]["original"] is True
    assert store.attrs["reduced"] == 1
    assert len(store) == 6
    by_zarr = zarr.open_group(store.path, mode="r")["pixels"][...]
    with openslide.OpenSlide(slide) as reference, open_slide(slide, "pyvips") as reader:
        shard = shard_path(store.path, 0).read_bytes()
        for (x, y), tile, other in zip(store.coords.tolist(), store.read(0, 6), by_zarr, strict=True):
            expected = np.asarray(reference.read_region((x, y), 0, (128, 128)).convert("RGB"))
            np.testing.assert_array_equal(tile, expected)  # lossless, though the codec is JPEG
            np.testing.assert_array_equal(other, expected)
            assert reader.jpeg_tiles(0).stored(y // 128 * 4 + x // 128) in shard


@pytest.mark.parametrize(
    ("grid", "changes"),
    [
        (parse_grid("128px_0.5mpp", 64), {}),  # half of the tiles straddle
        (parse_grid("64px_0.5mpp"), {}),
        (parse_grid("128px_0.51mpp"), {}),  # resampled
        (parse_grid("128px_0.5mpp"), {"codec": "zstd"}),
    ],
)
def test_other_grids_and_codecs_are_encoded_anew(slide, tmp_path, grid, changes):
    use_vips(tmp_path)
    run(tmp_path, grid, **{"codec": "jpeg", **changes})
    assert "original" not in store_of(tmp_path, grid).attrs["codec"]


def test_readers_agree_on_resampled_tiles(slide, tmp_path):
    grid = parse_grid("64px_0.7mpp")
    run(tmp_path, grid)
    expected = store_of(tmp_path, grid).read(0, 12)
    use_vips(tmp_path)
    run(tmp_path, grid, record={"slide_id": "s", "fingerprint": "again"})
    np.testing.assert_array_equal(store_of(tmp_path, grid).read(0, 12), expected)
