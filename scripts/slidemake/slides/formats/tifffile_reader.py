"""TIFFs that OpenSlide does not open, or takes for something else, through tifffile: OME-TIFF, WebP, JPEG XL, ZSTD, ...

The pages of the pyramid are chosen here (`level_pages`), and only those of this very file: an OME-XML that names other
files is not followed. A tile that the file leaves out is white.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.failures import SlideFailure
from slidemake.slides.formats.array_reader import ArrayReader, open_arrays
from slidemake.slides.formats.ome_xml import OmeImage, other_images, slide_image
from slidemake.slides.formats.tiff_index import TiffIndex, TiffPage, check_rgb, read_tiff_index
from slidemake.slides.reader import Mpp

CACHE_BYTES = 32 << 20  # decoded tiles kept per level
Place = tuple[int, int | None]  # number of a page, and of the sub-IFD below it (None: the page itself)


def level_pages(index: TiffIndex, page: int = 0) -> list[tuple[TiffPage, Place]]:
    """Pages of the pyramid whose finest level is page number `page`, finest first, with where they are in the file.

    They are its sub-IFDs; of a TIFF without any, the tiled pages after it that are marked as reduced copies.
    """
    first = index.pages[page]
    found: list[tuple[TiffPage, Place]] = [(sub, (page, n)) for n, sub in enumerate(first.subpages)]
    if not found and not index.is_ome:
        found = [(p, (n, None)) for n, p in enumerate(index.pages) if n > page and p.tiled and p.reduced]
    same = [(p, place) for p, place in found if (p.samples, p.bits) == (first.samples, first.bits)]
    smaller = [(p, place) for p, place in same if p.width < first.width and p.height < first.height]
    return [(first, (page, None)), *sorted(smaller, key=lambda pair: -pair[0].width)]


def ome_properties(image: OmeImage) -> dict[str, str]:
    """The objective, under the name that OpenSlide gives it."""
    return {"openslide.objective-power": f"{image.objective:g}"} if image.objective else {}


def check_rgb_or_planes(index: TiffIndex) -> None:
    """`not_brightfield` unless the slide is 8-bit RGB; an OME-TIFF may hold R, G and B as three planes."""
    if not index.pages:
        raise SlideFailure("unsupported", f"{index.path.name} is a TIFF file without images")
    if index.is_ome:
        image = slide_image(index)
        page = index.pages[image.page]
        if page.samples == 1 and page.bits == 8:
            if image.planes == 3 and not image.dye:
                return
            why = f" ({image.dye})" if image.dye else ""
            message = f"{index.path.name} has {image.planes} separate channel(s){why}, not RGB"
            raise SlideFailure("not_brightfield", message)
        check_rgb(page, index.path.name)
        return
    check_rgb(index.pages[0], index.path.name)


def open_tifffile(path: Path, mpp: Mpp = None) -> ArrayReader:
    """Open a tiled TIFF or an OME-TIFF. Raises SlideFailure `not_brightfield`, `unsupported`; OSError and what
    tifffile raises where the file is damaged.
    """
    import tifffile

    index = read_tiff_index(path)
    if index is None or not index.pages:
        raise SlideFailure("unsupported", f"{path.name} is not a TIFF file with images")
    check_rgb_or_planes(index)
    image = slide_image(index) if index.is_ome else None
    number = image.page if image else 0
    planes = image.planes if image and index.pages[number].samples == 1 else 1
    names, rivals = other_images(index, image) if image else ([], False)
    method = index.pages[number].compression
    if method not in tifffile.TIFF.DECOMPRESSORS:
        raise SlideFailure("unsupported", f"{path.name} is compressed by TIFF method {method}, which no reader decodes")
    tiff = tifffile.TiffFile(path)
    try:
        levels = [
            [_array(tiff, page + plane, below) for plane in range(planes)]
            for _, (page, below) in level_pages(index, number)
        ]
        arrays = [arrays[0] if planes == 1 else _Stacked(arrays) for arrays in levels]
        axes = "CYX" if planes > 1 or index.pages[number].planar else "YXS"
        reader = open_arrays(
            "tifffile",
            path,
            arrays,
            axes,
            tiff.close,
            mpp=mpp,
            file_mpp=image.mpp if image else index.pages[0].resolution,
            vendor="ome-tiff" if image else "tiff",
            properties=ome_properties(image) if image else {},
        )
    except BaseException:
        tiff.close()
        raise
    reader.other_images, reader.several_images = names, rivals
    return reader


def _array(tiff: Any, page: int, below: int | None) -> Any:
    """A page of a TIFF as a Zarr array: tiles are decoded when they are asked for; those that are absent are 255."""
    import zarr
    from zarr.experimental.cache_store import CacheStore
    from zarr.storage import MemoryStore

    found = tiff.pages[page] if below is None else tiff.pages[page].pages[below]
    store = CacheStore(store=found.aszarr(fillvalue=255), cache_store=MemoryStore(), max_size=CACHE_BYTES)
    return zarr.open_array(store, mode="r")


class _Stacked:
    """Planes of one colour each as one array (C, Y, X)."""

    def __init__(self, planes: list[Any]):
        self._planes, self.shape = planes, (len(planes), *planes[0].shape)

    def __getitem__(self, where: tuple[slice, ...]) -> Any:
        import numpy as np

        return np.stack([plane[where[1:]] for plane in self._planes])
