"""Tissue tiles out of a slide, beside nothing but decoding the JPEG tiles that they lie on."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from inputs import GRID, Slide, window_and_tiles
from measure import Row, compare, in_turns

RESAMPLED = "224px_0.7mpp"  # between two levels: every tile is read finer and resampled
PART = 64  # tiles that one task reads; as the tiling stage


class StoredTiles:
    """The JPEG tiles of one TIFF level under a set of tiles, in memory: what any reader has to decode at least."""

    def __init__(self, slide: Slide, window: Any, coords: np.ndarray):
        from slidemake.slides.formats.tiff_index import read_tiff_index
        from slidemake.slides.opening import open_slide

        index = read_tiff_index(Path(slide.path))
        level = slide.facts["levels"][window.level]
        pages = [] if index is None else [p for p in index.all_pages if (p.width, p.height) == _size(level)]
        if not pages or pages[0].compression != 7 or not pages[0].tiled:
            raise SystemExit(f"{slide.path}: level {window.level} is not in JPEG tiles; give another --slide")
        self.page, data = pages[0], np.memmap(slide.path, np.uint8, "r")
        wide, high = self.page.tile
        self.across = -(-self.page.width // wide)
        low = np.floor(coords / window.downsample + 1e-6).astype(int)
        ends = np.ceil(low + window.read_px - 1e-6).astype(int) - 1
        self.numbers = sorted(
            {
                y * self.across + x
                for (x0, y0), (x1, y1) in zip(low.tolist(), ends.tolist(), strict=True)
                for y in range(y0 // high, min(y1, self.page.height - 1) // high + 1)
                for x in range(x0 // wide, min(x1, self.page.width - 1) // wide + 1)
            }
        )
        page = self.page
        self.data = [data[page.offsets[n] : page.offsets[n] + page.counts[n]].tobytes() for n in self.numbers]
        self.check(open_slide, slide, window.level)

    def decode(self, data: bytes) -> np.ndarray:
        colour = "ycbcr" if self.page.photometric == 6 else "rgb"
        return imagecodecs.jpeg8_decode(
            data, tables=self.page.jpeg_tables or None, colorspace=colour, outcolorspace="rgb"
        )

    def check(self, open_slide: Any, slide: Slide, level: int) -> None:
        """The limit must do the work: its pixels are those that OpenSlide gives."""
        middle = len(self.data) // 2
        (wide, high), number = self.page.tile, self.numbers[middle]
        with open_slide(slide.path, reader="openslide") as reader:
            expected = reader.read_level(number % self.across * wide, number // self.across * high, level, wide, high)
        np.testing.assert_array_equal(self.decode(self.data[middle]), expected)

    def decode_all(self, threads: int, worth: int) -> float:
        """Decode every tile once; worth `worth` tissue tiles."""
        with ThreadPoolExecutor(threads) as pool:
            parts = [self.data[i : i + PART] for i in range(0, len(self.data), PART)]
            list(pool.map(lambda part: [self.decode(d) for d in part] and None, parts))
        return worth

    def decode_and_filter(self, threads: int, worth: int, regions: np.ndarray, window: Any) -> float:
        """As `decode_all`, then `worth` times the antialiased filter on regions in memory: what a resampled grid is."""
        from slidemake.tiles.reading import resample

        def filter_part(count: int) -> None:
            resample(regions[:count], window.read_size, window.tile_px)

        self.decode_all(threads, worth)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(filter_part, [min(PART, worth - i) for i in range(0, worth, PART)]))
        return worth


def _size(level: dict[str, Any]) -> tuple[int, int]:
    return level["width"], level["height"]


def our_reader(slide: Slide, window: Any, coords: np.ndarray, threads: int, name: str | None = None) -> float:
    """The tiling stage's reading: parts of a row-major list, on threads that share one reader."""
    from slidemake.slides.opening import open_slide
    from slidemake.tiles.reading import read_tiles

    def read(reader: Any, start: int) -> None:
        good = read_tiles(reader, coords[start : start + PART], window)[1]
        if not good.all():
            raise SystemExit(f"{slide.path}: a tile does not decode")

    with open_slide(slide.path, reader=name or slide.facts["reader"]) as reader, ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(read, reader), range(0, len(coords), PART)))
    return len(coords)


def openslide_alone(path: str, window: Any, coords: np.ndarray, threads: int) -> float:
    """`read_region` for every tile, as most pipelines do it."""
    import openslide

    def read(part: np.ndarray) -> None:
        for x, y in part.tolist():
            np.asarray(slide.read_region((x, y), window.level, (window.tile_px, window.tile_px)).convert("RGB"))

    with openslide.OpenSlide(path) as slide, ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [coords[i : i + PART] for i in range(0, len(coords), PART)]))
    return len(coords)


class OpenSlideTiles:
    """A torch data set over OpenSlide; every worker opens the slide for itself."""

    def __init__(self, path: str, level: int, side: int, coords: np.ndarray):
        self.path, self.level, self.side, self.coords = path, level, side, coords
        self.slide: Any = None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> Any:
        import openslide
        import torch

        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        x, y = self.coords[index].tolist()
        tile = self.slide.read_region((x, y), self.level, (self.side, self.side)).convert("RGB")
        return torch.from_numpy(np.array(tile)).permute(2, 0, 1)


def data_loader(path: str, window: Any, coords: np.ndarray, workers: int) -> float:
    from torch.utils.data import DataLoader

    loader = DataLoader(OpenSlideTiles(path, window.level, window.tile_px, coords), batch_size=64, num_workers=workers)
    return sum(len(batch) for batch in loader)


def measure(slide: Slide, repeats: int, most: int, section: str = "reading") -> list[Row]:
    """Rows of reading at most `most` tiles of the default grid, and of one that is resampled."""
    import torch

    torch.set_num_threads(1)
    rows: list[Row] = []
    for grid in (GRID, RESAMPLED):
        window, coords = window_and_tiles(slide, grid)
        coords = coords[:most]
        stored, name = StoredTiles(slide, window, coords), f"{slide.slide_id} {grid.replace('_', ' ')}"
        tasks: dict[str, Callable[[], float]] = {}
        for n in (1, 2):
            tasks[f"ours {n}"] = partial(our_reader, slide, window, coords, n)
            tasks[f"raw {n}"] = partial(stored.decode_all, n, len(coords))
            if grid == GRID:
                tasks[f"openslide {n}"] = partial(openslide_alone, slide.path, window, coords, n)
            else:
                side = math.ceil(window.read_px - 1e-6)
                regions = np.random.default_rng(0).integers(0, 255, (PART, side, side, 3), np.uint8)
                tasks[f"filtered {n}"] = partial(stored.decode_and_filter, n, len(coords), regions, window)
        if grid == GRID:
            for n in (0, 2):
                tasks[f"loader {n}"] = partial(data_loader, slide.path, window, coords, n)
        times = in_turns(tasks, repeats)

        for n in (1, 2):
            figure, what = times[f"ours {n}"], f"read {name}, {n} thread{'s' * (n > 1)}"
            bar = ">=0.7" if n == 2 else ""
            threads = f"{n} thread{'s' * (n > 1)}"
            beside = f"raw JPEG decoding, {threads}"
            rows.append(compare(section, what, "tiles/s", figure, beside, times[f"raw {n}"], bar=bar))
            if grid == RESAMPLED:
                beside = f"raw JPEG decoding, then the filter alone, {threads}"
                rows.append(compare(section, what, "tiles/s", figure, beside, times[f"filtered {n}"], bar=bar))
            else:
                peer = times[f"openslide {n}"]
                rows.append(compare(section, what, "tiles/s", figure, "OpenSlide read_region, same threads", peer))
        if grid == GRID:
            for n in (0, 2):
                beside = f"DataLoader over OpenSlide, {n} workers"
                rows.append(compare(section, what, "tiles/s", times["ours 2"], beside, times[f"loader {n}"]))
    return rows
