"""The index of a TIFF file (its IFDs), read without decoding a pixel.

Tells what a decoder does not say in time: data that lie beyond the end of the file, tiles that are missing, how the
pixels are compressed, how many channels there are. TIFF 6.0 and BigTIFF; NDPI above 4 GB is left to OpenSlide.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from slidemake.core.failures import SlideFailure

_TYPES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "u4,u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4,i4"}
_TYPES |= {11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_WANTED = {
    254,
    256,
    257,
    258,
    259,
    262,
    270,
    273,
    274,
    277,
    279,
    282,
    283,
    284,
    296,
    322,
    323,
    324,
    325,
    330,
    338,
    347,
    65420,
}
# Units of length in OME-XML, OME-NGFF and ImageJ's descriptions, and spellings that leave no doubt. "pixel" and
# "reference frame" say nothing.
UM_PER_UNIT = {
    **dict.fromkeys(("\u00b5m", "um", "\u03bcm", "micrometer", "micrometre", "micron", "microns"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-6),
    **dict.fromkeys(("\u00c5", "\u212b", "angstrom"), 1e-4),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), 1e5),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    **dict.fromkeys(("in", "inch"), 25400.0),
    "thou": 25.4,
    "pt": 25400.0 / 72,
}


@dataclass(frozen=True)
class TiffPage:
    """One image of a TIFF file: its geometry, coding, and where its data lie (bytes)."""

    width: int
    height: int
    tiled: bool
    compression: int
    photometric: int
    samples: int
    bits: int
    planar: bool
    alpha: bool
    description: str
    resolution: tuple[float, float] | None  # um per px from the resolution tags
    offsets: np.ndarray
    counts: np.ndarray
    tile: tuple[int, int] = (0, 0)
    jpeg_tables: bytes = b""
    orientation: int = 1  # how a viewer of photographs would turn it (TIFF 6.0, p. 36); 1: not at all
    reduced: bool = False  # marked as a smaller copy of another image
    subpages: tuple[TiffPage, ...] = ()


@dataclass(frozen=True)
class TiffIndex:
    """All pages of a TIFF file. `broken`: what of the index itself lies beyond the end of the file."""

    path: Path
    size: int
    pages: tuple[TiffPage, ...]
    broken: str = ""
    ndpi: bool = False

    @property
    def is_ome(self) -> bool:
        return bool(self.pages) and "<OME" in self.pages[0].description[:4096]

    @property
    def all_pages(self) -> list[TiffPage]:
        return [p for page in self.pages for p in (page, *page.subpages)]

    @property
    def mirrored_by_openslide(self) -> bool:
        """Whether OpenSlide would show every tile mirrored in itself: where a tag of orientation turns the picture,
        it lets libtiff turn each tile (JPEG and JPEG 2000 it decodes by itself, as they lie).
        """
        own = (7, 33003, 33005)
        return any(page.orientation > 1 and page.compression not in own for page in self.all_pages)


@dataclass
class _Walk:
    handle: BinaryIO
    size: int
    order: Literal["<", ">"]
    big: bool
    seen: set[int] = field(default_factory=set)
    read: int = 0  # bytes of the index so far
    ndpi: bool = False


MOST_IMAGES = 5000  # of a file: a pyramid has a dozen; planes of a stack of focus some hundreds
MOST_BYTES = 1 << 29  # of its index: 400 gigapixels in tiles of 256 px have 100 MB


class _BeyondEnd(Exception):
    pass


def read_tiff_index(path: Path) -> TiffIndex | None:
    """Index of a TIFF file; None if it is not one."""
    if path.is_dir():
        return None
    with open(path, "rb") as handle:
        head = handle.read(16)
        if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
        order: Literal["<", ">"] = "<" if head[:2] == b"II" else ">"
        big = 43 in (head[2], head[3])
        walk = _Walk(handle, path.stat().st_size, order, big)
        pages: list[TiffPage] = []
        try:
            offset = struct.unpack(order + "Q", head[8:16])[0] if big else struct.unpack(order + "I", head[4:8])[0]
            while offset and offset not in walk.seen:
                page, offset = _page(walk, offset)
                if page is not None:
                    pages.append(page)
        except (_BeyondEnd, struct.error) as error:
            return TiffIndex(path, walk.size, tuple(pages), str(error) or "the index ends too early", walk.ndpi)
    return TiffIndex(path, walk.size, tuple(pages), "", walk.ndpi)


def _bytes(walk: _Walk, offset: int, count: int) -> bytes:
    if offset + count > walk.size:
        raise _BeyondEnd(f"its index points to byte {offset + count} of {walk.size}")
    walk.read += count
    if walk.read > MOST_BYTES:
        raise SlideFailure(
            "unsupported", f"{Path(walk.handle.name).name}: its index is larger than {MOST_BYTES >> 20} MB"
        )
    walk.handle.seek(offset)
    return walk.handle.read(count)


def _page(walk: _Walk, offset: int) -> tuple[TiffPage | None, int]:
    walk.seen.add(offset)
    if len(walk.seen) > MOST_IMAGES:
        name = Path(walk.handle.name).name
        raise SlideFailure("unsupported", f"{name} holds more than {MOST_IMAGES} images: no slide has so many")
    width, entry, value = (8, 20, 8) if walk.big else (2, 12, 4)
    number = int.from_bytes(_bytes(walk, offset, width), "little" if walk.order == "<" else "big")
    table = _bytes(walk, offset + width, number * entry + value)
    tags: dict[int, np.ndarray] = {}
    for i in range(number):
        raw = table[i * entry : (i + 1) * entry]
        tag, kind, count = struct.unpack(walk.order + ("HHQ" if walk.big else "HHI"), raw[:-value])
        if tag not in _WANTED or kind not in _TYPES:
            continue
        dtype = np.dtype(_TYPES[kind]).newbyteorder(walk.order)
        data = raw[-value:]
        if count * dtype.itemsize > value:
            where = struct.unpack(walk.order + ("Q" if walk.big else "I"), data)[0]
            data = _bytes(walk, where, count * dtype.itemsize)
        tags[tag] = np.frombuffer(data, dtype, count)
    following = struct.unpack(walk.order + ("Q" if walk.big else "I"), table[-value:])[0]
    walk.ndpi |= 65420 in tags
    subpages = [_page(walk, int(o))[0] for o in tags.get(330, ()) if o and int(o) not in walk.seen]
    return _make_page(tags, tuple(p for p in subpages if p is not None)), following


def _make_page(tags: dict[int, np.ndarray], subpages: tuple[TiffPage, ...]) -> TiffPage | None:
    if 256 not in tags or 257 not in tags:
        return None

    def number(tag: int, default: int) -> int:
        return int(tags[tag][0]) if tag in tags and len(tags[tag]) else default

    text = _text(tags[270].tobytes()) if 270 in tags else ""
    offsets, counts = (tags.get(a, tags.get(b, np.zeros(0))).astype(np.int64) for a, b in ((324, 273), (325, 279)))
    return TiffPage(
        width=number(256, 0),
        height=number(257, 0),
        tiled=322 in tags,
        compression=number(259, 1),
        photometric=number(262, 2),
        samples=number(277, 1),
        bits=int(tags[258].max()) if 258 in tags else 1,
        planar=number(284, 1) == 2,
        alpha=number(338, 0) in (1, 2),
        description=text,
        resolution=_resolution(tags, _unit(text, number(296, 2))),
        offsets=offsets,
        counts=counts,
        tile=(number(322, 0), number(323, 0)),
        jpeg_tables=tags[347].tobytes() if 347 in tags else b"",
        orientation=number(274, 1),
        reduced=bool(number(254, 0) & 1),
        subpages=subpages,
    )


def _text(data: bytes) -> str:
    """Text of a tag: UTF-8, or what some writers take for it (a micro sign of one byte)."""
    data = data.split(b"\0")[0]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _unit(description: str, unit: int) -> float | None:
    """um of the unit that resolution tags count in; None where they say no size.

    ImageJ and Fiji put theirs into the description, and mean it whatever the tag says
    (https://imagej.net/ij/docs/guide/146-28.html, "Set Scale").
    """
    if is_imagej(description) and (given := re.search(r"^unit=(.*)$", description, re.MULTILINE)):
        return UM_PER_UNIT.get(re.sub(r"\\u00b5", "\u00b5", given[1].strip(), flags=re.IGNORECASE))
    return {2: 25400.0, 3: 10000.0}.get(unit)


def is_imagej(description: str) -> bool:
    """Whether a TIFF's description is one that ImageJ writes."""
    return description.startswith("ImageJ=")


def _resolution(tags: dict[int, np.ndarray], um: float | None) -> tuple[float, float] | None:
    if um is None or 282 not in tags or 283 not in tags:
        return None
    values = [tags[t][0] for t in (282, 283)]
    if any(v[0] == 0 or v[1] == 0 for v in values):
        return None
    x, y = (um * float(v[1]) / float(v[0]) for v in values)
    return x, y


@dataclass(frozen=True)
class TileMap:
    """Which tiles of a page have bytes in the file: present (rows, columns) bool, tiles of `tile` (w, h) px."""

    tile: tuple[int, int]
    present: np.ndarray

    def any_in(self, x: int, y: int, w: int, h: int) -> bool:
        """Whether a window, in px of the page, touches a tile that has bytes."""
        wide, high = self.tile
        return bool(self.present[y // high : -(-(y + h) // high), x // wide : -(-(x + w) // wide)].any())


def tile_map(index: TiffIndex, width: int, height: int) -> TileMap | None:
    """Tiles of the pages of this size (of all of them together); None where the index does not say."""
    pages = [page for page in index.all_pages if (page.width, page.height) == (width, height)]
    if not pages or index.ndpi or index.broken:
        return None
    tile, present = pages[0].tile, None
    for page in pages:
        if not page.tiled or page.planar or page.tile != tile or min(tile) < 1:
            return None
        rows, columns = -(-height // tile[1]), -(-width // tile[0])
        if min(len(page.counts), len(page.offsets)) < rows * columns:
            return None
        there = ((page.counts > 0) & (page.offsets > 0))[: rows * columns].reshape(rows, columns)
        present = there if present is None else present | there
    return None if present is None else TileMap(tile, present)


def check_whole(index: TiffIndex) -> None:
    """Raise SlideFailure `truncated` when the file ends before the data its index speaks of."""
    if index.ndpi and index.size >= 1 << 32:
        return  # 64-bit offsets hidden in 32-bit tags
    if index.broken:
        raise SlideFailure("truncated", f"{index.path.name} ends too early: {index.broken}")
    lost = total = 0
    for page in index.all_pages:
        n = min(len(page.offsets), len(page.counts))
        ends, there = page.offsets[:n] + page.counts[:n], page.counts[:n] > 0
        lost += int((ends[there] > index.size).sum())
        total += n
    if lost:
        message = (
            f"{index.path.name}: {lost} of {total} tiles or strips lie beyond the end of the file ({index.size} bytes)"
        )
        raise SlideFailure("truncated", message)


def check_rgb(page: TiffPage, name: str) -> None:
    """Raise SlideFailure `not_brightfield` unless the page holds 8-bit RGB, with or without alpha.

    Grey and 16-bit images are refused rather than stretched: what the stain and the encoder expect is colour.
    """
    if page.photometric == 3:  # palette: the readers expand it
        return
    if page.samples not in (3, 4) or (page.samples == 4 and not page.alpha):
        raise SlideFailure("not_brightfield", f"{name} has {page.samples} channel(s) per pixel, not RGB")
    if page.bits != 8:
        raise SlideFailure("not_brightfield", f"{name} has {page.bits} bits per channel, not 8")
