"""Reading JPEG-tiled TIFFs through libvips: a few times as fast as OpenSlide.

Only for files on which `opening.choose_reader` found it pixel-equal to the reference. The libvips wheel has no JPEG
2000 and may return black without an error: such files never come here.

libvips also goes on after a damaged JPEG tile: it returns what was decoded of it, or black for that tile and for sound
ones after it, and leaves no more than a note in its error buffer, which all threads and slides of the process share.
So a note seen by anyone makes every reader that is open take its tiles, from then on, one by one from the file and
through the strict decoder of `jpeg_tiles` (a libjpeg-turbo, too, hence the same pixels): what a read gives does not
depend on who saw the note first, and a damaged tile is always an error. Tiling reads through `jpeg_tiles` from the
start; libvips serves overviews and single regions.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pyvips

from slidemake.core.failures import SlideFailure
from slidemake.slides.formats.jpeg_tiles import JpegTiles
from slidemake.slides.formats.ome_xml import other_images, slide_image
from slidemake.slides.formats.openslide_reader import OpenSlideReader
from slidemake.slides.formats.tiff_index import TiffIndex, TiffPage, check_rgb, read_tiff_index
from slidemake.slides.formats.tifffile_reader import level_pages, ome_properties
from slidemake.slides.reader import Level, Mpp, SlideReader, make_levels

logging.getLogger("pyvips").setLevel(logging.ERROR)  # what matters is raised, with the file's name
pyvips.cache_set_max(0)  # no operation cache: a closed slide gives its memory back

JPEG = 7  # TIFF compression


def vips_may_read(index: TiffIndex, ome: bool = False) -> bool:
    """Whether the file is worth a comparison: 8-bit RGB in JPEG tiles, none absent."""
    if index.broken or index.ndpi or not index.pages:
        return False
    if ome:
        pages = [page for page, _ in level_pages(index, slide_image(index).page)]
    else:
        pages = [page for page in index.pages if page.tiled]
    return bool(pages) and all(_plain_tiles(page) for page in pages)


def _plain_tiles(page: TiffPage) -> bool:
    rgb = page.samples == 3 and page.bits == 8 and not page.planar and page.photometric in (2, 6)
    # A tile of no bytes is black to libvips; OpenSlide fills it from another level or leaves it white.
    return page.tiled and rgb and page.compression == JPEG and bool(len(page.counts)) and bool(page.counts.min() > 0)


class _Notes:
    """The process-wide error buffer of libvips: counts how often something was found in it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._seen = 0

    def collect(self) -> int:
        """How many notes were seen so far in this process; empties the buffer."""
        with self.lock:
            if pyvips.ffi.string(pyvips.vips_lib.vips_error_buffer()):
                pyvips.vips_lib.vips_error_clear()
                self._seen += 1
            return self._seen


_NOTES = _Notes()


class VipsReader(SlideReader):
    """libvips regions, one per thread and level; levels are TIFF pages, or the sub-IFDs of an OME-TIFF.

    libvips keeps two rows of decoded tiles per level in use: 150 MB on a level 100,000 px wide, 3 MB at 2,000.
    """

    name = "pyvips"

    def __init__(self, path: Path, mpp: Mpp = None):
        index = read_tiff_index(path)
        if index is None or not index.pages:
            raise SlideFailure("unsupported", f"{path.name} is not a TIFF file")
        self._associated: list[str] = []
        if index.is_ome:
            image = slide_image(index)
            chosen = level_pages(index, image.page)
            self._pages = [page for page, _ in chosen]
            self._sources = [{"page": n, "subifd": -1 if below is None else below} for _, (n, below) in chosen]
            levels = make_levels([(p.width, p.height) for p in self._pages])
            properties = ome_properties(image)
            super().__init__(path, levels, mpp=mpp, file_mpp=image.mpp, vendor="ome-tiff", properties=properties)
            self._associated, self.several_images = other_images(index, image)
        else:
            with OpenSlideReader(path, mpp) as known:
                numbers = [_page_of(index, level) for level in known.levels]
                self._pages = [index.pages[n] for n in numbers]
                self._sources = [{"page": n} for n in numbers]
                super().__init__(
                    path,
                    known.levels,
                    mpp=mpp,
                    file_mpp=known.file_mpp,
                    vendor=known.vendor,
                    properties=known.properties,
                    bounds=known.bounds,
                )
                self._associated = known.associated()
        check_rgb(self._pages[0], path.name)
        self._images: dict[int, pyvips.Image] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._stored: dict[tuple[int, int], JpegTiles] = {}
        self._notes_before = _NOTES.collect()

    def close(self) -> None:
        self._local = threading.local()
        self._images = {}
        for tiles in self._stored.values():
            tiles.close()
        self._stored = {}

    def associated(self) -> list[str]:
        return list(self._associated)

    def _region(self, level: int) -> pyvips.Region:
        regions = self._local.__dict__.setdefault("regions", {})
        if level not in regions:
            with self._lock:
                image = self._images.get(level)
                if image is None:
                    image = self._images[level] = self._load(level)
            regions[level] = pyvips.Region.new(image)
        return regions[level]

    def _load(self, level: int) -> pyvips.Image:
        try:
            image = pyvips.Image.tiffload(str(self.path), access="random", fail_on="warning", **self._sources[level])
        except pyvips.Error as error:
            raise OSError(f"{self.path.name}: libvips does not open level {level}: {error}") from error
        size = self.stored[level]
        if (image.width, image.height, image.bands, image.format) != (size.width, size.height, 3, "uchar"):
            raise OSError(f"{self.path.name}: libvips sees level {level} as {image}")
        return image

    def _read_inside(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        if _NOTES.collect() == self._notes_before:
            data = _fetch(self._region(level), lx, ly, w, h)
            if data is not None and _NOTES.collect() == self._notes_before:
                return data.reshape(h, w, 3)
        return self._stored_tiles(level).read(lx, ly, w, h)

    def _stored_tiles(self, level: int, reduce: int = 1) -> JpegTiles:
        """Shared by all threads (see `SlideReader.jpeg_tiles`)."""
        with self._lock:
            found = self._stored.get((level, reduce))
            if found is None:
                found = self._stored[level, reduce] = JpegTiles(self.path, self._pages[level], reduce)
        return found


def _fetch(region: pyvips.Region, x: int, y: int, w: int, h: int) -> np.ndarray | None:
    """`Region.fetch` that leaves the error buffer alone (pyvips.Error empties it, with notes of other threads)."""
    size = pyvips.ffi.new("size_t *")
    pointer = pyvips.vips_lib.vips_region_fetch(region.pointer, x, y, w, h, size)
    if pointer == pyvips.ffi.NULL:
        return None
    return np.frombuffer(pyvips.ffi.buffer(pyvips.ffi.gc(pointer, pyvips.glib_lib.g_free), size[0]), np.uint8)


def _page_of(index: TiffIndex, level: Level) -> int:
    for number, page in enumerate(index.pages):
        if page.tiled and (page.width, page.height) == (level.width, level.height):
            return number
    raise OSError(f"{index.path.name}: no tiled page of {level.width} x {level.height} px")
