"""Odd slides of every format that can be written here: what is read is compared with the picture each was made of.

Every slide goes through screening; then tiles at three resolutions are compared with Pillow's reduction of the picture
at the same place. So position, scale, um per px and colour are those of one and the same thing, or the slide has a
typed failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image
from slidemake.cohort.sheet import SlideRow
from slidemake.core.failures import SlideFailure
from slidemake.slides.opening import open_screened
from slidemake.slides.screening import screen_slide
from slidemake.tiles.grid import Grid, slide_window, tile_positions
from slidemake.tiles.reading import read_tiles, reduction

WIDTH, HEIGHT = 704, 480
SIDE = 48  # px of a tile
CM = {"resolutionunit": "CENTIMETER"}
TOOL = Path(os.environ.get("SLIDEMAKE_TEST_DATA", "nowhere")).parent / "tools" / "odd_slides.py"


def picture(w: int = WIDTH, h: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Coloured blobs on a bright ground, no two places alike: (h, w, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(70, 250, (h // 24 + 1, w // 24 + 1, 3), dtype=np.uint8))
    image = np.asarray(small.resize((w, h), Image.Resampling.BICUBIC)).copy()
    image[:32], image[:, :32], image[-32:], image[:, -32:] = 243, 243, 243, 243
    return image


def half(image: np.ndarray, factor: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image


def resolution(mpp: float, mpp_y: float | None = None) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / (mpp_y or mpp)), **CM}


def vips(path: Path, image: np.ndarray, mpp: float = 0.5, **options: Any) -> None:
    held = pyvips.Image.new_from_array(image).copy(interpretation="srgb", xres=1000 / mpp, yres=1000 / mpp)
    how = {"tile": True, "tile_width": 128, "tile_height": 128, "pyramid": True, "compression": "jpeg", "Q": 95}
    held.tiffsave(str(path), **{"resunit": "cm", **how, **options})


def pages(path: Path, levels: list[np.ndarray], tags: list[dict[str, Any]], **how: Any) -> None:
    how = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None, **how}
    with tifffile.TiffWriter(path, bigtiff=how.pop("bigtiff", False)) as tiff:
        for number, (level, own) in enumerate(zip(levels, tags, strict=True)):
            tiff.write(level, **{"subfiletype": int(number > 0), **how, **own})


def svs(path: Path, image: np.ndarray) -> None:
    h, w = image.shape[:2]
    text = f"Aperio Image Library v10.0.51\r\n{w}x{h} [0,0 {w}x{h}] (128x128) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    how = {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)}
    thumbnail = {"tile": None, "rowsperstrip": 16, "description": "Aperio Image Library\r\n-> 88x60", "subfiletype": 0}
    level = {"description": "Aperio Image Library\r\n(128x128) -> 176x120", "subfiletype": 0}
    pages(path, [image, half(image, 8), half(image, 4)], [{"description": text}, thumbnail, level], **how)


def ome(path: Path, images: list[tuple[np.ndarray, str, float | None]], **how: Any) -> None:
    how = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, **how}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for image, name, mpp in images:
            size = {f"PhysicalSize{axis}": mpp for axis in "XY"} if mpp else {}
            tiff.write(image, metadata={"axes": "YXS", "Name": name, **size}, subifds=1, **how)
            tiff.write(half(image, 2), subfiletype=1, **how)


def without_tiles(path: Path, levels: dict[int, int]) -> None:
    """Takes the first tiles of the first rows away: {number of a page, sub-IFDs counted in: tiles across and down}."""
    with tifffile.TiffFile(path) as tiff:
        todo, seen = [], [p for page in tiff.pages for p in (page, *(page.pages or ()))]
        for number, most in levels.items():
            across = -(-seen[number].imagewidth // seen[number].tilewidth)
            for tag in (seen[number].tags[324], seen[number].tags[325]):
                size = {3: 2, 4: 4, 16: 8}[tag.dtype]
                todo += [(tag.valueoffset + size * (y * across + x), size) for y in range(most) for x in range(most)]
    with open(path, "r+b") as handle:
        for at, size in todo:
            handle.seek(at)
            handle.write(bytes(size))


def zarr_slide(path: Path, image: np.ndarray, version: int, absent: bool = False) -> None:
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    datasets = []
    for number, factor in enumerate((1, 2)):
        level = np.moveaxis(half(image, factor), 2, 0)
        array = group.create_array(str(number), shape=level.shape, dtype="uint8", chunks=(3, 64, 64), fill_value=0)
        array[:] = level
        scale = [1, 0.5 * factor, 0.5 * factor]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        if absent:
            for y in range(2 // factor):
                for x in range(2 // factor):
                    name = f"{number}/0.{y}.{x}" if version == 2 else f"{number}/c/0/{y}/{x}"
                    (path / name).unlink()
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", "unit": "micrometer"} for a in "yx")]
    told = {"multiscales": [{"version": "0.4" if version == 2 else "0.5", "axes": axes, "datasets": datasets}]}
    group.attrs.update(told if version == 2 else {"ome": told})


def missing(image: np.ndarray, side: int = 128) -> np.ndarray:
    image = image.copy()
    image[:side, :side] = 255
    return image


def padded(path: Path, image: np.ndarray) -> None:
    levels = []
    for factor in (1, 2, 4):
        small = half(image, factor)
        high, wide = (-(-size // 128) * 128 if factor > 1 else size for size in small.shape[:2])
        full = np.full((high, wide, 3), 243, np.uint8)
        full[: small.shape[0], : small.shape[1]] = small
        levels.append(full)
    pages(path, levels, [resolution(0.5 * f) for f in (1, 2, 4)])


def imagej(path: Path, unit: str, per_unit: float = 2, **how: Any) -> None:
    """As ImageJ saves a picture with a scale: the unit in its description, and none in the tag."""
    text = f"ImageJ=1.54f\nunit={unit}\nloop=false\n"
    own = {"description": text, "resolution": (per_unit, per_unit), "resolutionunit": "NONE", **how}
    pages(path, [IMAGE], [own])


def turned(path: Path, turn: int, how: str = "zlib") -> None:
    """With a tag that says how the picture is to be turned, which tifffile and libvips read back."""
    pages(path, [IMAGE], [resolution(0.5) | {"extratags": [(274, 3, 1, turn, True)]}], compression=how)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags["Orientation"].value == turn
    upright = pyvips.Image.new_from_file(str(path)).autorot().numpy().astype(int)
    assert np.abs(upright - {1: IMAGE, 2: IMAGE[:, ::-1], 6: np.rot90(IMAGE, -1)}[turn]).mean() < 1.5


IMAGE = picture()
LITTLE = half(IMAGE, 8)
Write = Callable[[Path], Any]
# name of the file: how it is written, um per px (x, y), flags, the picture that must come out (IMAGE if None)
RIGHT: dict[str, tuple[Write, tuple[float, float], list[str], np.ndarray | None]] = {
    "cm.tiff": (lambda p: vips(p, IMAGE), (0.5, 0.5), [], None),
    "inch.tiff": (lambda p: vips(p, IMAGE, resunit="inch"), (0.5, 0.5), [], None),
    "big.tiff": (lambda p: vips(p, IMAGE, bigtiff=True), (0.5, 0.5), [], None),
    "webp.tiff": (lambda p: vips(p, IMAGE, compression="webp", lossless=True), (0.5, 0.5), [], None),
    "zstd.tiff": (lambda p: pages(p, [IMAGE], [resolution(0.5)], compression="zstd"), (0.5, 0.5), [], None),
    "aperio.svs": (lambda p: svs(p, IMAGE), (0.5, 0.5), [], None),
    "planar.tiff": (
        lambda p: pages(p, [np.moveaxis(IMAGE, 2, 0).copy()], [resolution(0.5)], planarconfig="separate"),
        (0.5, 0.5), [], None,
    ),
    "strips.tiff": (lambda p: pages(p, [IMAGE], [resolution(0.5)], tile=None, rowsperstrip=16), (0.5, 0.5), [], None),
    "motorola.tiff": (lambda p: tifffile.imwrite(p, IMAGE, byteorder=">", tile=(128, 128), photometric="rgb",
                                                 **resolution(0.5)), (0.5, 0.5), [], None),
    "ome.ome.tiff": (lambda p: ome(p, [(IMAGE, "slide", 0.5)]), (0.5, 0.5), [], None),
    "macro.ome.tiff": (lambda p: ome(p, [(half(IMAGE, 2), "macro", 0.8), (IMAGE, "slide", 0.4)]), (0.4, 0.4), [], None),
    "label.ome.tiff": (lambda p: ome(p, [(IMAGE, "slide", 0.5), (LITTLE, "label", 20.0)]), (0.5, 0.5), [], None),
    "two.ome.tiff": (
        lambda p: ome(p, [(half(IMAGE, 2), "left", 0.25), (IMAGE, "right", 0.5)]), (0.5, 0.5), ["several_images"], None,
    ),
    "deflate.ome.tiff": (
        lambda p: ome(p, [(IMAGE, "", 0.5)], compression="zlib", compressionargs=None), (0.5, 0.5), [], None,
    ),
    "zarr2.zarr": (lambda p: zarr_slide(p, IMAGE, 2), (0.5, 0.5), [], None),
    "zarr3.zarr": (lambda p: zarr_slide(p, IMAGE, 3), (0.5, 0.5), [], None),
    "absent2.zarr": (lambda p: zarr_slide(p, IMAGE, 2, absent=True), (0.5, 0.5), [], missing(IMAGE)),
    "absent3.zarr": (lambda p: zarr_slide(p, IMAGE, 3, absent=True), (0.5, 0.5), [], missing(IMAGE)),
    "absent.tiff": (
        lambda p: (vips(p, IMAGE, tile_width=64, tile_height=64), without_tiles(p, {0: 4, 1: 2, 2: 1})),
        (0.5, 0.5), [], missing(IMAGE, 256),
    ),
    "absent.ome.tiff": (
        lambda p: (ome(p, [(IMAGE, "", 0.5)]), without_tiles(p, {0: 2, 1: 1})), (0.5, 0.5), [], missing(IMAGE, 256),
    ),
    "oblong.tiff": (
        lambda p: pages(p, [IMAGE, half(IMAGE, 2)], [resolution(0.25, 0.5), resolution(0.5, 1.0)]),
        (0.25, 0.5), ["pixels_not_square"], None,
    ),
    "oblong5.tiff": (
        lambda p: pages(p, [IMAGE], [resolution(0.475, 0.5)], compression="jpeg"),
        (0.475, 0.5), ["pixels_not_square"], None,
    ),
    "rounding.tiff": (lambda p: pages(p, [IMAGE], [resolution(0.4999, 0.5001)]), (0.5, 0.5), [], None),
    "padded.tiff": (lambda p: padded(p, IMAGE), (0.5, 0.5), ["levels_not_aligned"], None),
    "blank_level.tiff": (
        lambda p: pages(p, [IMAGE, np.full_like(half(IMAGE, 2), 200), half(IMAGE, 4)], [resolution(0.5)] * 3),
        (0.5, 0.5), ["levels_not_aligned"], None,
    ),
    "other_level.tiff": (
        lambda p: pages(p, [IMAGE, half(picture(seed=9), 2), half(IMAGE, 4)], [resolution(0.5)] * 3),
        (0.5, 0.5), ["levels_not_aligned"], None,
    ),
    "shifted_level.tiff": (
        lambda p: pages(p, [IMAGE, np.roll(half(IMAGE, 2), 24, (0, 1))], [resolution(0.5)] * 2),
        (0.5, 0.5), ["levels_not_aligned"], None,
    ),
    "third_level.tiff": (
        lambda p: pages(p, [IMAGE, np.asarray(Image.fromarray(IMAGE).resize((282, 192), Image.Resampling.BOX))],
                        [resolution(0.5)] * 2),
        (0.5, 0.5), [], None,
    ),
    "imagej.tiff": (lambda p: imagej(p, "um", tile=None), (0.5, 0.5), [], None),
    "imagej_tiled.tiff": (lambda p: imagej(p, "\\u00B5m", compression="jpeg"), (0.5, 0.5), [], None),
    "imagej_nm.tiff": (lambda p: imagej(p, "nm", 1e-3 * 2), (0.5, 0.5), [], None),
    "imagej_inch_tag.tiff": (lambda p: imagej(p, "micron", resolutionunit="INCH"), (0.5, 0.5), [], None),
    **{
        f"turned{turn}_{how}.tiff": (
            lambda p, turn=turn, how=how: turned(p, turn, how), (0.5, 0.5), ["orientation_not_applied"], None,
        )
        for turn in (2, 6)
        for how in ("zlib", "jpeg")
    },
    "upright.tiff": (lambda p: turned(p, 1), (0.5, 0.5), [], None),
    "palette.tiff": (
        lambda p: pages(p, [np.asarray(FEW)], [resolution(0.5)], photometric="palette", colormap=PALETTE),
        (0.5, 0.5), [], np.asarray(Image.fromarray(IMAGE).quantize(256).convert("RGB")),
    ),
}  # fmt: skip
FEW = Image.fromarray(IMAGE).quantize(256)
PALETTE = np.array(FEW.getpalette()[:768]).reshape(256, 3).T.astype(np.uint16) * 257


def check_tiles(
    record: dict[str, Any], image: np.ndarray, mpp: tuple[float, float], most: float, leave_out: int = 0
) -> None:
    """Tiles at 1, 2.2 and 4.1 times the coarser side of a pixel, against Pillow's reduction of the same square; but for
    those that begin within `leave_out` px of both edges.
    """
    for factor in (1.0, 2.2, 4.1):
        grid = Grid("g", SIDE, round(max(mpp) * factor, 6), SIDE)
        window = slide_window(grid, record)
        assert [s * m for s, m in zip(window.size_level0, mpp, strict=True)] == pytest.approx([SIDE * grid.mpp] * 2)
        coords = tile_positions(window, record["width"], record["height"])
        assert len(coords) >= 2
        coords = coords[(coords >= leave_out).any(axis=1)][:: max(1, len(coords) // 40)]
        with open_screened(record) as reader:
            tiles, good = read_tiles(reader, coords, window)
            step = window.downsample * reduction(reader, window)
        assert good.all()
        w, h = window.size_level0
        corners = np.floor(coords / step + 0.5) * step  # a tile begins at the nearest pixel of what is read
        held = Image.fromarray(image)
        for (x, y), tile in zip(corners.tolist(), tiles, strict=True):
            wanted = held.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
            assert np.abs(np.asarray(wanted, float) - tile).mean() < most, (grid.mpp, x, y, window.level)


@pytest.mark.parametrize("name", RIGHT)
def test_pixels_and_metadata_are_of_the_same_thing(name: str, tmp_path: Path) -> None:
    make, mpp, flags, wanted = RIGHT[name]
    make(tmp_path / name)
    record = screen_slide(SlideRow.for_screening("s", str(tmp_path / name)), {"reader": "auto"}, tmp_path / "results")
    assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
    assert record["mpp_xy"] == pytest.approx(mpp, rel=1e-5)
    assert record["flags"] == flags
    check_tiles(record, IMAGE if wanted is None else wanted, mpp, 2.0)


# name of the file: how it is written, code of the failure
WRONG: dict[str, tuple[Write, str]] = {
    "grey.tiff": (lambda p: pages(p, [IMAGE[..., 1]], [resolution(0.5)], photometric="minisblack"), "not_brightfield"),
    "deep.tiff": (lambda p: pages(p, [IMAGE.astype(np.uint16) * 257], [resolution(0.5)]), "not_brightfield"),
    "float.tiff": (lambda p: pages(p, [IMAGE.astype(np.float32)], [resolution(0.5)]), "not_brightfield"),
    "cmyk.tiff": (
        lambda p: pages(p, [np.dstack([255 - IMAGE, 0 * IMAGE[..., :1]])], [resolution(0.5)], photometric="separated"),
        "not_brightfield",
    ),
    "four.tiff": (
        lambda p: pages(p, [np.dstack([IMAGE, IMAGE[..., :1]])], [resolution(0.5)], extrasamples=["unspecified"]),
        "not_brightfield",
    ),
    "bits.tiff": (
        lambda p: pages(p, [IMAGE[..., 1] > 150], [resolution(0.5)], photometric="minisblack"), "not_brightfield",
    ),
    "grey.png": (lambda p: Image.fromarray(IMAGE[..., 1]).save(p), "not_brightfield"),
    "cmyk.jpg": (lambda p: Image.fromarray(IMAGE).convert("CMYK").save(p), "not_brightfield"),
    "deep.ome.tiff": (
        lambda p: tifffile.imwrite(p, IMAGE.astype(np.uint16), ome=True, tile=(128, 128), photometric="rgb"),
        "not_brightfield",
    ),
    "dpi.png": (lambda p: Image.fromarray(IMAGE).save(p, dpi=(300, 300)), "no_mpp"),
    "dpi.jpg": (lambda p: Image.fromarray(IMAGE).save(p, dpi=(50800, 50800)), "no_mpp"),
    "screen.tiff": (lambda p: vips(p, IMAGE, 25400 / 72), "implausible_mpp"),
    "print.tiff": (lambda p: vips(p, IMAGE, 25400 / 600), "implausible_mpp"),
    "overview.tiff": (lambda p: vips(p, IMAGE, 28.97), "too_coarse"),
    "imagej_pixel.tiff": (lambda p: imagej(p, "pixel"), "no_mpp"),
    "no_unit.tiff": (lambda p: pages(p, [IMAGE], [{"resolution": (2, 2), "resolutionunit": "NONE"}]), "no_mpp"),
    "none.ome.tiff": (lambda p: ome(p, [(IMAGE, "slide", None), (LITTLE, "roi", 0.25)]), "no_mpp"),
    "bomb.ome.tiff": (
        lambda p: pages(p, [IMAGE], [{"description": '<!DOCTYPE x [<!ENTITY a "0.5">]><OME><Image/></OME>'}]),
        "unsupported",
    ),
    "torn.ome.tiff": (lambda p: pages(p, [IMAGE], [{"description": "<OME><Image></OME>"}]), "unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right_is_a_typed_failure(name: str, tmp_path: Path) -> None:
    make, code = WRONG[name]
    make(tmp_path / name)
    with pytest.raises(SlideFailure) as failure:
        screen_slide(SlideRow.for_screening("s", str(tmp_path / name)), {"reader": "auto"}, tmp_path / "results")
    assert failure.value.code == code, failure.value


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_plain_images_with_a_given_size(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(IMAGE).convert(mode)
    image.save(tmp_path / "x.png")
    record = screen_slide(SlideRow.for_screening("s", str(tmp_path / "x.png"), mpp=0.5), {"reader": "auto"}, tmp_path)
    check_tiles(record, np.asarray(image.convert("RGB")), (0.5, 0.5), 2.0)


def test_all_readers_give_the_same_place(tmp_path: Path) -> None:
    """The same slide by every reader that opens it: level by level, in the middle, over the edge, at odd positions."""
    vips(tmp_path / "a.tiff", picture(901, 613))
    opened = [screen_slide(SlideRow.for_screening(name, str(tmp_path / "a.tiff")), {"reader": name}, tmp_path)
              for name in ("pyvips", "openslide", "tifffile")]  # fmt: skip
    assert [record["reader"] for record in opened] == ["pyvips", "openslide", "tifffile"]
    for key in ("width", "height", "mpp", "mpp_xy", "levels", "bounds", "flags"):
        assert opened[0][key] == opened[1][key] == opened[2][key], key
    for level, x, y in [(0, 0, 0), (0, 333, 217), (1, 401, 303), (2, 880, 600), (1, -20, -30)]:
        parts = []
        for record in opened:
            with open_screened(record) as reader:
                parts.append(reader.read(x, y, level, 60, 50).astype(int))
        assert np.array_equal(parts[0], parts[2])
        assert np.abs(parts[0] - parts[1]).mean() < 3  # OpenSlide interpolates where a downsample is not an integer


# What becomes of the slides of the shared tool whose outcome is not "read as the picture it was made of, at 0.5 um/px".
SPECIAL = {
    "rgba_unspecified": "not_brightfield", "grey": "not_brightfield", "rgb16": "not_brightfield", "appmag": "no_mpp",
    "ome_pixelunit": "no_mpp", "ome_second_mpp": "no_mpp", "no_mpp_first_then_roi": "no_mpp",
    "aniso": (0.25, 0.5), "aniso5": (0.475, 0.525), "macro04_first": (0.25, 0.25),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    not (TOOL.is_file() and os.environ.get("SLIDEMAKE_ODD_SLIDES")),
    reason="takes a minute: set SLIDEMAKE_ODD_SLIDES=1, with tools/odd_slides.py beside SLIDEMAKE_TEST_DATA",
)
def test_the_odd_slides_of_the_test_data(tmp_path: Path) -> None:
    import csv

    subprocess.run([sys.executable, str(TOOL), str(tmp_path)], check=True, capture_output=True)
    with open(tmp_path / "slides.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) >= 36
    assert set(SPECIAL) <= {row["slide_id"] for row in rows}
    wrong = {}
    for row in rows:
        name, wanted = row["slide_id"], SPECIAL.get(row["slide_id"], (0.5, 0.5))
        try:
            record = screen_slide(
                SlideRow.for_screening(name, str(tmp_path / row["path"])), {"reader": "auto"}, tmp_path
            )
            if record["mpp_xy"] != pytest.approx(wanted, rel=1e-4):
                wrong[name] = record["mpp_xy"]
            base = tmp_path / "base" / f"{name}.npy"
            if base.exists() and not isinstance(wanted, str):
                absent = 512 if name.startswith("sparse") else 0  # on some levels only
                # real tissue, compressed, with levels that were taken by stride
                check_tiles(record, np.load(base), record["mpp_xy"], 14.0, absent)
        except SlideFailure as failure:
            if failure.code != wanted:
                wrong[name] = str(failure)
        except AssertionError as error:
            wrong[name] = error.args
    assert not wrong, wrong


def test_a_reader_that_would_mirror_tiles_is_refused(tmp_path: Path) -> None:
    """OpenSlide turns every tile in itself; if a release of it no longer does, this tells."""
    from slidemake.slides.formats.openslide_reader import OpenSlideReader

    turned(tmp_path / "a.tiff", 2)
    with OpenSlideReader(tmp_path / "a.tiff") as slide:
        assert np.array_equal(slide.read(0, 0, 0, 128, 128), IMAGE[:128, :128][:, ::-1])
    with pytest.raises(SlideFailure, match="mirrors every tile"):
        screen_slide(SlideRow.for_screening("s", str(tmp_path / "a.tiff")), {"reader": "openslide"}, tmp_path)


def test_imagej_and_tifffile_agree_on_the_scale(tmp_path: Path) -> None:
    """What tifffile writes for ImageJ is read, and what it reads of a file that we take the scale of is the same."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(4, 4), metadata={"unit": "um", "axes": "YXS"})
    record = screen_slide(SlideRow.for_screening("s", str(path)), {"reader": "auto"}, tmp_path / "results")
    with tifffile.TiffFile(path) as tiff:
        assert tiff.imagej_metadata["unit"] == "um"
        per_um = tiff.pages[0].tags["XResolution"].value
    assert record["mpp"] == pytest.approx(per_um[1] / per_um[0]) == pytest.approx(0.25)
    assert record["mpp_source"] == "file"
