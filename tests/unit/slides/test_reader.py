"""Readers: the same pixels from every implementation, at the edges, from threads, and from damaged files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import pyvips
import tifffile
from slidemake.core.failures import RunError, SlideFailure
from slidemake.slides.formats.ome_xml import parse_xml, physical_size
from slidemake.slides.formats.tiff_index import check_whole, read_tiff_index
from slidemake.slides.opening import choose_reader, open_slide, same_pixels, sample_regions
from slidemake.slides.reader import Level, best_level, make_levels

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real slides to read")


def picture(w: int, h: int, seed: int = 0) -> np.ndarray:
    """Smooth colour fields with blobs on a bright ground: (h, w, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(90, 250, (h // 16 + 2, w // 16 + 2, 3), dtype=np.uint8)
    big = np.kron(small, np.ones((16, 16, 1), np.uint8))[:h, :w]
    return np.clip(big.astype(int) + rng.integers(-6, 7, big.shape), 0, 255).astype(np.uint8)


def save_pyramid(path: Path, image: np.ndarray, mpp: float = 0.5, **options: object) -> Path:
    vips = pyvips.Image.new_from_array(image).copy(interpretation="srgb", xres=1000 / mpp, yres=1000 / mpp)
    how = {"tile": True, "tile_width": 128, "tile_height": 128, "pyramid": True, "compression": "jpeg", "Q": 85}
    vips.tiffsave(str(path), resunit="cm", **{**how, **options})
    return path


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1501 x 1203 px: levels whose downsamples are not integers."""
    return save_pyramid(tmp_path_factory.mktemp("reader") / "odd.tiff", picture(1501, 1203))


def damage(source: Path, target: Path, tile: int, start: float, filling: bytes) -> tuple[int, int]:
    """Overwrite the data of one tile of page 0 from a fraction on; returns the tile's corner."""
    page = read_tiff_index(source).pages[0]
    data = bytearray(source.read_bytes())
    offset, count = int(page.offsets[tile]), int(page.counts[tile])
    first = offset + int(start * count)
    data[first : offset + count] = (filling * count)[: offset + count - first]
    target.write_bytes(data)
    across = -(-page.width // page.tile[0])
    return tile % across * page.tile[0], tile // across * page.tile[1]


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "level"),
    [(0.5, 0), (1, 0), (1.99, 0), (1.9999, 1), (2, 1), (3.99, 1), (4, 2), (15.9, 2), (16, 3), (99, 3)],
)
def test_best_level_takes_broken_downsamples_for_what_they_are(asked: float, level: int) -> None:
    levels = [Level(1000, 1000, 1.0), Level(500, 500, 1.99995), Level(250, 250, 3.9998), Level(62, 62, 16.012)]
    assert best_level(levels, asked) == level


def test_downsample_is_the_mean_ratio_as_in_openslide(pyramid: Path) -> None:
    with openslide.OpenSlide(str(pyramid)) as slide:
        levels = make_levels(slide.level_dimensions)
        assert [v.downsample for v in levels] == pytest.approx(list(slide.level_downsamples), rel=1e-12)


# --- the same pixels --------------------------------------------------------------------------------------------------


def test_auto_chooses_pyvips_where_it_agrees(pyramid: Path) -> None:
    assert choose_reader(pyramid) == "pyvips"
    with openslide.OpenSlide(str(pyramid)) as slide, open_slide(pyramid) as reader:
        assert reader.name == "pyvips"
        assert reader.mpp == pytest.approx(0.5)
        assert reader.vendor == "generic-tiff"
        for level, size in enumerate(slide.level_dimensions):
            whole = np.asarray(slide.read_region((0, 0), level, size).convert("RGB"))
            assert np.array_equal(reader.read(0, 0, level, *size), whole)


def test_both_readers_agree_at_level_0_everywhere(pyramid: Path) -> None:
    rng = np.random.default_rng(3)
    with open_slide(pyramid, "pyvips") as a, open_slide(pyramid, "openslide") as b:
        for _ in range(30):
            x, y = (int(v) for v in rng.integers(-200, 1500, 2))
            w, h = (int(v) for v in rng.integers(1, 400, 2))
            assert np.array_equal(a.read(x, y, 0, w, h), b.read(x, y, 0, w, h)), (x, y, w, h)


def test_position_is_rounded_to_the_nearest_pixel_of_the_level(pyramid: Path) -> None:
    with open_slide(pyramid, "pyvips") as reader:
        level = len(reader.levels) - 1
        size = reader.levels[level]
        whole = reader.read_level(0, 0, level, size.width, size.height)
        for lx in (0, 1, 17, 50):
            for beside in (-0.4, 0, 0.4):
                got = reader.read((lx + beside) * size.downsample, 0, level, 20, 30)
                assert np.array_equal(got, whole[:30, lx : lx + 20])


@pytest.mark.parametrize("name", ["pyvips", "openslide"])
def test_outside_is_white(pyramid: Path, name: str) -> None:
    with open_slide(pyramid, name) as reader:
        assert (reader.read(-500, -500, 0, 64, 64) == 255).all()
        assert (reader.read(5000, 5000, 1, 64, 64) == 255).all()
        edge = reader.read(1501 - 10, 1203 - 20, 0, 64, 64)
        assert (edge[20:] == 255).all()
        assert (edge[:, 10:] == 255).all()
        assert np.array_equal(edge[:20, :10], reader.read(0, 0, 0, 1501, 1203)[-20:, -10:])
        corner = reader.read(-30, -40, 0, 64, 64)
        assert np.array_equal(corner[40:, 30:], reader.read(0, 0, 0, 34, 24))
        assert (corner[:40] == 255).all()


def test_a_reader_that_returns_black_is_not_chosen(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slidemake.slides.formats import vips_reader as reader_vips

    black = lambda self, lx, ly, level, w, h: np.zeros((h, w, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr(reader_vips.VipsReader, "_read_inside", black)
    assert choose_reader(pyramid) == "openslide"


def test_sample_is_fixed_and_reaches_over_the_edge() -> None:
    levels = make_levels([(3000, 2000), (1500, 1000)])
    sample = sample_regions(levels)
    assert sample == sample_regions(levels)
    assert [region[0] for region in sample] == [0] * 4 + [1] * 4
    assert any(x + px > levels[n].width and y + px > levels[n].height for n, x, y, px in sample)


def test_threads_get_what_one_thread_gets(pyramid: Path) -> None:
    places = [(x, y, level) for level in (0, 1) for x in range(0, 1400, 200) for y in range(0, 1200, 200)]
    for name in ("pyvips", "openslide"):
        with open_slide(pyramid, name) as reader:
            alone = [reader.read(x, y, level, 150, 150) for x, y, level in places]
        with open_slide(pyramid, name) as reader, ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda p, r=reader: r.read(*p, 150, 150), places * 2))
        assert all(np.array_equal(a, b) for a, b in zip(alone * 2, together, strict=True))


def test_alpha_is_flattened_on_white(tmp_path: Path) -> None:
    from PIL import Image

    rgba = np.full((40, 60, 4), 100, np.uint8)
    rgba[:, :20, 3], rgba[:, 20:40, 3], rgba[:, 40:, 3] = 255, 0, 51
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.5) as reader:
        assert reader.name == "tiatoolbox"
        row = reader.read(0, 0, 0, 60, 40)[0]
    assert (row[:20] == 100).all()
    assert (row[20:40] == 255).all()
    assert (row[40:] == 224).all()  # 0.2 * 100 + 0.8 * 255


# --- overview ---------------------------------------------------------------------------------------------------------


def test_overview_is_the_area_mean(tmp_path: Path) -> None:
    image = picture(1000, 600)
    path = save_pyramid(tmp_path / "flat.tiff", image, pyramid=False, compression="deflate")
    with open_slide(path) as reader:
        overview, sx, sy = reader.overview(2.0)  # whole factor 4
        assert (sx, sy) == (4.0, 4.0)
        mean = image.reshape(150, 4, 250, 4, 3).mean(axis=(1, 3))
        assert np.abs(overview - mean).max() <= 0.5
        overview, sx, sy = reader.overview(0.625)  # 1.25: an area mean with fractions of pixels
        assert (sx, sy) == (1.25, 1.25)
        fine = image.repeat(4, 0).repeat(4, 1).reshape(480, 5, 800, 5, 3).mean(axis=(1, 3))
        assert np.abs(overview - fine).max() <= 0.51
        overview, sx, sy = reader.overview(1.25)  # 2.5 = 2 x 1.25: in two steps
        fine = image.repeat(2, 0).repeat(2, 1).reshape(240, 5, 400, 5, 3).mean(axis=(1, 3))
        assert (sx, sy) == (2.5, 2.5)
        assert np.abs(overview - fine).mean() < 1
        assert np.array_equal(reader.overview(0.1)[0], image)  # never enlarged
        assert max(reader.thumbnail(300).shape) <= 300


def test_overview_covers_the_slide_and_is_never_coarser(pyramid: Path) -> None:
    with open_slide(pyramid) as reader:
        for mpp in (0.6, 0.97, 1.0, 3.3, 8.0, 31.0):
            overview, sx, sy = reader.overview(mpp)
            assert max(sx, sy) * 0.5 <= mpp * 1.004
            assert overview.shape[1] * sx >= 1501 - 1e-6
            assert (overview.shape[1] - 1) * sx < 1501
            assert overview.shape[0] * sy >= 1203 - 1e-6
    with open_slide(pyramid, mpp=0.25) as reader:
        assert reader.overview(2.5)[1] == pytest.approx(10, rel=0.01)  # the caller's mpp stands before the file's


def test_overview_reads_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_pyramid(tmp_path / "single.tiff", picture(3000, 2500), pyramid=False)
    with open_slide(path, "pyvips") as reader:
        largest = []
        inside = type(reader)._read_inside
        watch = lambda self, lx, ly, level, w, h: largest.append(w * h) or inside(self, lx, ly, level, w, h)  # noqa: E731
        monkeypatch.setattr(type(reader), "_read_inside", watch)
        reader.overview(20.0)
    assert max(largest) <= 1024 * 1024


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pyvips", "openslide"])
@pytest.mark.parametrize(("start", "filling"), [(0.5, b"\0"), (0.0, b"\0"), (0.02, b"\xff")])
def test_a_corrupt_tile_raises_again_and_again_and_harms_no_other(
    pyramid: Path, tmp_path: Path, name: str, start: float, filling: bytes
) -> None:
    x, y = damage(pyramid, tmp_path / "bad.tiff", 15, start, filling)
    with open_slide(tmp_path / "bad.tiff", name) as reader, open_slide(pyramid, name) as whole:
        for _ in range(2):
            with pytest.raises(OSError, match=r"bad\.tiff"):
                reader.read(x + 8, y + 8, 0, 100, 100)
            assert np.array_equal(reader.read(x + 128, y, 0, 128, 128), whole.read(x + 128, y, 0, 128, 128))
        overview, _, _ = reader.overview_at(1.0)
        assert reader.corrupt_blocks
        assert (overview[y : y + 128, x : x + 128] == 255).all()
        keep = np.ones((1203, 1501), bool)
        keep[y : y + 128, x : x + 128] = False
        for row in range(0, 1203, 128):  # all that is not near the damage, before and after it in the file
            for column in range(0, 1501, 128):
                box = keep[row : row + 128, column : column + 128]
                if box.all():
                    part = reader.read(column, row, 0, box.shape[1], box.shape[0])
                    assert np.array_equal(part, whole.read(column, row, 0, box.shape[1], box.shape[0]))


@pytest.mark.parametrize("name", ["pyvips", "openslide"])
def test_one_corrupt_tile_among_threads(pyramid: Path, tmp_path: Path, name: str) -> None:
    x, y = damage(pyramid, tmp_path / "bad.tiff", 15, 0.5, b"\0")
    places = [(px, py) for py in range(0, 1152, 128) for px in range(0, 1408, 128)] * 4

    def failed(place: tuple[int, int]) -> bool:
        try:
            reader.read(*place, 0, 128, 128)
        except OSError:
            return True
        return False

    with open_slide(tmp_path / "bad.tiff", name) as reader, ThreadPoolExecutor(4) as pool:
        outcome = list(pool.map(failed, places))
    assert outcome == [place == (x, y) for place in places]


@pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
def test_strict_decoding_gives_the_same_pixels(tmp_path: Path, colours: str) -> None:
    how = {"tile": (128, 128), "compression": "jpeg", "photometric": colours}
    if colours == "ycbcr":
        save_pyramid(tmp_path / "a.tiff", picture(700, 500), pyramid=False, Q=75)
    else:
        tifffile.imwrite(tmp_path / "a.tiff", picture(700, 500), compressionargs={"outcolorspace": "rgb"}, **how)
    with open_slide(tmp_path / "a.tiff", "pyvips") as reader:
        for x, y, w, h in ((0, 0, 700, 500), (100, 90, 300, 200), (640, 384, 60, 116), (127, 127, 2, 2)):
            assert np.array_equal(reader.jpeg_tiles(0).read(x, y, w, h), reader.read(x, y, 0, w, h))


def test_truncated_tiff_is_told_from_its_tags(pyramid: Path, tmp_path: Path) -> None:
    data = pyramid.read_bytes()
    check_whole(read_tiff_index(pyramid))
    (tmp_path / "half.tiff").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideFailure, match=r"half\.tiff") as failure:
        check_whole(read_tiff_index(tmp_path / "half.tiff"))
    assert failure.value.code == "truncated"


def test_index_agrees_with_tifffile(pyramid: Path) -> None:
    index = read_tiff_index(pyramid)
    with tifffile.TiffFile(pyramid) as tiff:
        for ours, theirs in zip(index.pages, tiff.pages, strict=True):
            assert (ours.height, ours.width, ours.samples) == theirs.shape
            assert ours.tiled == theirs.is_tiled
            assert (ours.offsets.tolist(), ours.counts.tolist()) == (
                list(theirs.dataoffsets),
                list(theirs.databytecounts),
            )
            assert ours.tile == (theirs.tilewidth, theirs.tilelength)
    assert index.pages[0].resolution == pytest.approx((0.5, 0.5))


def test_what_is_not_a_slide(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("not a slide")
    (tmp_path / "empty").mkdir()
    for path, code in (
        (tmp_path / "text.svs", "unsupported"),
        (tmp_path / "empty", "unsupported"),
        (tmp_path / "no", "missing_file"),
    ):
        with pytest.raises(SlideFailure) as failure:
            open_slide(path)
        assert failure.value.code == code
    with pytest.raises(RunError, match="Unknown reader"):
        open_slide(tmp_path / "text.svs", "magic")


# --- through TIAToolbox -----------------------------------------------------------------------------------------------


def save_ome(path: Path, image: np.ndarray, compression: str = "jpeg", **metadata: object) -> Path:
    metadata = {"axes": "YXS", "PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm", **metadata}
    metadata |= {"PhysicalSizeY": metadata["PhysicalSizeX"], "PhysicalSizeYUnit": metadata["PhysicalSizeXUnit"]}
    how = {"tile": (128, 128), "compression": compression, "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=2, metadata=metadata, **how)
        tiff.write(image[::2, ::2], subfiletype=1, **how)
        tiff.write(image[::4, ::4], subfiletype=1, **how)
    return path


def test_ome_tiff_with_sub_ifds(tmp_path: Path) -> None:
    image = picture(900, 700)
    jpeg = save_ome(tmp_path / "jpeg.ome.tiff", image)
    assert choose_reader(jpeg) == "pyvips"  # equal to what tifffile gives
    with open_slide(jpeg, "pyvips") as a, open_slide(jpeg, "tifffile") as b:
        assert [v.width for v in a.levels] == [900, 450, 225]
        assert same_pixels(b, a)
    path = save_ome(tmp_path / "slide.ome.tiff", image, "deflate")
    for name in ("auto", "tifffile", "tiatoolbox"):
        with open_slide(path, name) as reader:
            assert reader.mpp == pytest.approx(0.5)  # 500 nm
            assert [v.width for v in reader.levels] == [900, 450, 225]
            assert np.array_equal(reader.read(100, 50, 0, 200, 150), image[50:200, 100:300])
            assert np.array_equal(reader.read(400, 200, 2, 60, 50), image[::4, ::4][50:100, 100:160])
            assert (reader.read(890, 690, 0, 30, 30)[10:] == 255).all()


def test_ome_tiff_of_planes_and_of_dyes(tmp_path: Path) -> None:
    image = picture(300, 260)
    planes = np.moveaxis(image, 2, 0)
    how = {"tile": (128, 128), "photometric": "minisblack", "ome": True}
    tifffile.imwrite(tmp_path / "planes.ome.tiff", planes, metadata={"axes": "CYX"}, **how)
    with open_slide(tmp_path / "planes.ome.tiff") as reader:
        assert reader.name == "tifffile"
        assert reader.mpp is None
        assert np.array_equal(reader.read(10, 20, 0, 100, 90), image[20:110, 10:110])
    names = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
    tifffile.imwrite(tmp_path / "dyes.ome.tiff", planes, metadata=names, **how)
    tifffile.imwrite(tmp_path / "deep.ome.tiff", image.astype(np.uint16), metadata={"axes": "YXS"}, tile=(128, 128))
    for name in ("dyes", "deep"):
        with pytest.raises(SlideFailure) as failure:
            open_slide(tmp_path / f"{name}.ome.tiff")
        assert failure.value.code == "not_brightfield"


def test_ome_units() -> None:
    def said(attributes: str) -> tuple[float, float] | None:
        return physical_size(parse_xml(f"<Pixels {attributes}/>", "x").attrib)

    assert said('PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm" PhysicalSizeY="0.5"') == (0.25, 0.5)
    assert said('PhysicalSizeX="0,25" PhysicalSizeY="2,5e-1"') == (0.25, 0.25)
    assert said('PhysicalSizeX="250" PhysicalSizeXUnit="nm"') == (0.25, 0.25)
    assert said('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m" PhysicalSizeY="0.5"') == (0.5, 0.5)
    assert said('PhysicalSizeX="0.5" PhysicalSizeXUnit="micron" PhysicalSizeY="0.5"') == (0.5, 0.5)
    for text in ('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"', "", 'PhysicalSizeX="nan"', 'PhysicalSizeX="-1"'):
        assert said(text) is None, text
    assert said('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel" PhysicalSizeY="0.5"') is None
    assert said('PhysicalSizeX="1,000.5"') is None


def test_jpeg_2000(tmp_path: Path) -> None:
    glymur = pytest.importorskip("glymur")
    if glymur.version.openjpeg_version < "2":
        pytest.skip("the OpenJPEG library is not installed")
    image = picture(700, 500)
    path = tmp_path / "slide.jp2"
    glymur.Jp2k(str(path), data=image, numres=4, capture_resolution=[4e6, 4e6])  # lossless; px per metre
    with open_slide(path) as reader:
        assert (reader.name, reader.vendor, reader.dimensions) == ("tiatoolbox", "jp2", (700, 500))
        assert reader.mpp == pytest.approx(0.25)
        assert np.array_equal(reader.read(600, 400, 0, 200, 150)[:100, :100], image[400:, 600:])
        half = reader.read(200, 100, 1, 100, 80)
        mean = image[100:260, 200:400].reshape(80, 2, 100, 2, 3).mean(axis=(1, 3))
        assert np.abs(half - mean).mean() < 8  # a wavelet's low pass is near the mean
        assert reader.read(690, 490, 1, 20, 20).shape == (20, 20, 3)


@pytest.mark.parametrize(("version", "axes"), [("0.4", "tczyx"), ("0.4", "yxc"), ("0.5", "cyx")])
def test_ome_zarr(tmp_path: Path, version: str, axes: str) -> None:
    import zarr

    image = picture(400, 300)
    path = tmp_path / "slide.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for number, step in enumerate((1, 2, 4)):
        part = np.moveaxis(image[::step, ::step], 2, 0) if axes != "yxc" else image[::step, ::step]
        part = part[None, :, None] if axes == "tczyx" else part
        array = group.create_array(str(number), shape=part.shape, dtype="uint8", chunks=part.shape)
        array[:] = part
        scale = [0.25 * step if axis in "yx" else 1 for axis in axes]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    named = [
        {"name": a, **({"type": "space", "unit": "micrometer"} if a in "yx" else {"type": "channel"})} for a in axes
    ]
    omero = {"name": "x", "id": 1, "version": version, "rdefs": {"model": "color", "defaultT": 0, "defaultZ": 0}}
    window = {"start": 0, "end": 255, "min": 0, "max": 255}
    channel = {"coefficient": 1, "color": "FF0000", "family": "linear", "inverted": False, "active": True}
    omero["channels"] = [{"label": name, "window": window, **channel} for name in ("red", "green", "blue")]
    attributes = {"multiscales": [{"version": version, "axes": named, "datasets": datasets}], "omero": omero}
    group.attrs.update(attributes if version == "0.4" else {"ome": attributes})
    with open_slide(path) as reader:
        assert (reader.name, reader.vendor, reader.mpp) == ("tiatoolbox", "ome-zarr", 0.25)
        assert [v.downsample for v in reader.levels] == [1, 2, 4]
        assert np.array_equal(reader.read(100, 40, 0, 50, 60), image[40:100, 100:150])
        assert np.array_equal(reader.read(200, 100, 2, 30, 20), image[::4, ::4][25:45, 50:80])


def test_plain_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    from slidemake.slides.formats import tiatoolbox_reader as reader_tiatoolbox

    image = picture(320, 200)
    Image.fromarray(image).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "strips.tif", image, photometric="rgb", rowsperstrip=50)
    for name in ("a.png", "strips.tif"):
        with open_slide(tmp_path / name, mpp=0.4) as reader:
            assert (reader.name, reader.mpp, reader.file_mpp) == ("tiatoolbox", 0.4, None)
            assert np.array_equal(reader.read(10, 20, 0, 100, 50), image[20:70, 10:110])
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(image.astype(np.uint16)[..., 0]).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        with pytest.raises(SlideFailure) as failure:
            open_slide(tmp_path / name)
        assert failure.value.code == "not_brightfield"
    monkeypatch.setattr(reader_tiatoolbox, "MAX_DECODED_BYTES", 1000)
    with pytest.raises(SlideFailure, match="too large"):
        open_slide(tmp_path / "a.png")


# --- real slides ------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", ["cmu-1-small-region.svs", "prostate_mpp-absurd.tiff", "cmu-0-overview_mpp3.2.tiff"])
def test_pyvips_equals_openslide_on_real_slides(name: str) -> None:
    path = Path(str(DATA)) / "slides" / name
    assert choose_reader(path) == "pyvips"
    with open_slide(path, "pyvips") as a, openslide.OpenSlide(str(path)) as b:
        for level, size in enumerate(b.level_dimensions):
            assert np.array_equal(a.read(0, 0, level, *size), np.asarray(b.read_region((0, 0), level, size))[..., :3])


@needs_data
def test_dicom_by_folder_and_by_file_and_by_tiatoolbox() -> None:
    folder = Path(str(DATA)) / "slides" / "cmu-small_dicom"
    with (
        open_slide(folder) as a,
        open_slide(sorted(folder.iterdir())[0]) as b,
        open_slide(folder, "tiatoolbox") as c,
        open_slide(folder.parent / "cmu-1-small-region.svs") as svs,
    ):
        assert (a.name, c.name) == ("openslide", "tiatoolbox")
        assert a.dimensions == b.dimensions == c.dimensions == svs.dimensions
        assert a.mpp == c.mpp == pytest.approx(0.499)
        assert same_pixels(a, b)
        region = a.read(700, 900, 0, 300, 300).astype(int)
        assert np.abs(region - c.read(700, 900, 0, 300, 300)).mean() < 2  # other JPEG decoders
        assert np.abs(region - svs.read(700, 900, 0, 300, 300)).mean() < 12  # compressed once more
        assert svs.associated() == ["label", "macro", "thumbnail"]


def test_an_overview_reads_only_blocks_that_have_stored_tiles(tmp_path, monkeypatch):
    import zlib

    side, across = 256, 12
    stored = {0: 40, 5 * across + 7: 90}  # tile number -> its grey

    def tiles():
        for number in range(across * across):
            grey = stored.get(number)
            yield b"" if grey is None else zlib.compress(bytes([grey]) * (side * side * 3))

    path = tmp_path / "sparse.tiff"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        shape = (across * side, across * side, 3)
        file.write(tiles(), shape=shape, dtype=np.uint8, tile=(side, side), photometric="rgb", compression="zlib")
    with open_slide(path, mpp=0.5) as slide:
        expected = slide.read(0, 0, 0, across * side, across * side)[::16, ::16]
        read = []
        inside = type(slide)._read_inside
        monkeypatch.setattr(
            type(slide), "_read_inside", lambda self, x, y, *rest: read.append((x, y)) or inside(self, x, y, *rest)
        )
        overview = slide.overview(8.0)[0]
    assert sorted(read) == [(0, 0), (1024, 1024)]
    assert np.array_equal(overview, expected)
    assert overview[0, 0].tolist() == [40] * 3
    assert overview[5 * 16 + 3, 7 * 16 + 3].tolist() == [90] * 3
    assert overview[100, 100].tolist() == [255] * 3
