"""Whether the levels of a pyramid show the same picture, each at the scale that its size says.

The scale of a level is taken from its size, and some writers pad levels to whole tiles: 1,936 px reduced by 2 become
1,024, which reads as a downsample of 1.891, and everything found on that level lies beside where it is. Others call a
label, a blank page or a second copy a level. So every level is compared with a finer one in places with structure, far
from the corner where all scales agree; where its size and the picture disagree, the scale is that of its resolution
tag, or the whole number nearby, that the picture confirms. A level that shows something else is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage as ndi

from slidemake.slides.formats.tiff_index import TiffIndex
from slidemake.slides.reader import Level, SlideReader

WINDOW = 160  # px of the level compared in one place
PLACES = 3
SMALLEST = 64  # px: levels with a shorter side are not looked at
STRUCTURE = 3.0  # grey levels of standard deviation, below which there is nothing to compare
# Correlation above which two windows certainly show the same, and below which they do not. On real slides, scanners'
# and JPEG-compressed again, levels have 0.94 and more; another place or scale has less than 0.2.
SAME, OTHER = 0.7, 0.4
FROM_FINER = 8.0  # a window at the finer level has this many times the side at most, or memory would not be bounded


def aligned_levels(slide: SlideReader, index: TiffIndex | None = None) -> tuple[tuple[Level, ...], bool]:
    """The levels of `slide` that fit together, with their true scale, and whether that differs from what it says.

    `index`: of a TIFF, whose resolution tags may say the scale of a level. Reads about 0.2 megapixels per level, and
    as many of the finer one times the square of the step between them.
    """
    places = _places(slide)
    found, changed = [slide.stored[0]], False
    for level in slide.stored[1:]:
        if level.width > slide.stored[0].width or level.height > slide.stored[0].height:
            changed = True  # no smaller copy of the first
            continue
        if min(level.width, level.height) < SMALLEST or not places:
            found.append(level)
            continue
        scale = _scale(slide, level, found, places, list(_candidates(level, slide.stored[0], index)))
        if scale is None:
            changed = True
        elif scale == level.downsample:
            found.append(level)
        else:
            changed = True
            width = min(level.width, -int(-slide.dimensions[0] // scale))
            height = min(level.height, -int(-slide.dimensions[1] // scale))
            found.append(Level(width, height, scale, level.number))
    return tuple(found), changed


def _candidates(level: Level, first: Level, index: TiffIndex | None) -> Iterator[float]:
    """Scales that a level may have: by its size; then, where no whole number explains that, by its tag and nearby."""
    yield level.downsample
    whole = round(level.downsample)
    if all(abs(size / whole - px) < 1.01 for size, px in ((first.width, level.width), (first.height, level.height))):
        return
    pages = index.all_pages if index is not None else []
    own = next((p.resolution for p in pages if (p.width, p.height) == (level.width, level.height)), None)
    base = next((p.resolution for p in pages if (p.width, p.height) == (first.width, first.height)), None)
    if own and base:
        yield (own[0] / base[0] + own[1] / base[1]) / 2
    yield from (float(n) for n in (whole, whole + 1, 2 ** round(np.log2(level.downsample))) if n > 1)


def _scale(
    slide: SlideReader,
    level: Level,
    finer: Sequence[Level],
    places: Sequence[tuple[float, float]],
    candidates: Sequence[float],
) -> float | None:
    """The candidate at which the level shows what the finest level that is near enough shows; None if none does.

    The first, by the level's size, stands where the picture does not contradict it or nothing can be compared.
    """
    near = [one for one in finer if level.downsample / one.downsample <= FROM_FINER]
    reference = near[0] if level.downsample < 1.5 or not near else near[-1]
    scores = {}
    for scale in dict.fromkeys(candidates):
        alike = [_alike(slide, level, reference, place, scale) for place in places]
        told = [value for value in alike if value is not None]
        if not told:
            return candidates[0]
        scores[scale] = float(np.median(told))
        if scale == candidates[0] and scores[scale] >= SAME and len(candidates) == 1:
            return scale
    best = max(scores, key=lambda scale: scores[scale])
    if scores[best] < OTHER:
        return None
    return best if scores[best] > scores[candidates[0]] + 0.05 else candidates[0]


def _alike(
    slide: SlideReader, level: Level, reference: Level, place: tuple[float, float], scale: float
) -> float | None:
    """Correlation of a window of the level with the same place on the reference; None where nothing can be said."""
    side = min(WINDOW, level.width, level.height)
    x = int(np.clip(round(place[0] / scale - side / 2), 0, level.width - side))
    y = int(np.clip(round(place[1] / scale - side / 2), 0, level.height - side))
    step = scale / reference.downsample
    left, top, extent = int(x * step), int(y * step), int(np.ceil(side * step)) + 1
    try:
        seen = _read(slide, level, x, y, side)
        wanted = _read(slide, reference, left, top, extent)
    except OSError:
        return None
    dx, dy = x * step - left, y * step - top
    area = (dx, dy, min(dx + side * step, extent), min(dy + side * step, extent))
    wanted = np.asarray(Image.fromarray(wanted).resize((side, side), Image.Resampling.BOX, box=area))
    a, b = (_structure(part) for part in (seen, wanted))
    if b.std() < STRUCTURE:
        return None
    return float((a * b).mean() / (max(float(a.std()), 1.0) * float(b.std())))


def _structure(grey: np.ndarray) -> np.ndarray:
    """What is of the size of nuclei and glands at this level: neither noise, nor where tissue ends and glass begins."""
    fine = ndi.gaussian_filter(grey.astype(np.float32), 1.0)
    band = (fine - ndi.gaussian_filter(fine, 8.0))[2:-2, 2:-2]
    return band - band.mean()


def _read(slide: SlideReader, level: Level, x: int, y: int, side: int) -> np.ndarray:
    """Green channel (side, side) uint8 of a stored level, white outside it."""
    out = np.full((side, side), 255, np.uint8)
    stored = next(one for one in slide.stored if one.number == level.number)
    w, h = min(side, stored.width - x), min(side, stored.height - y)
    if w > 0 and h > 0:
        out[:h, :w] = slide._read_inside(x, y, level.number, w, h)[..., 1]
    return out


def _places(slide: SlideReader) -> list[tuple[float, float]]:
    """Level-0 positions with structure, the first as far from the corner as there is, the others far from the first."""
    grey, sx, sy = slide.overview_of(384)
    detail = ndi.uniform_filter(ndi.gaussian_gradient_magnitude(grey[..., 1].astype(np.float32), 1.0), 9)
    if detail.max() < 0.7:
        return []
    ys, xs = np.nonzero(detail > 0.5 * np.percentile(detail, 98))
    points = np.stack([(xs + 0.5) * sx, (ys + 0.5) * sy], axis=1)
    points = points[:: max(1, len(points) // 4000)]
    chosen = [points[np.argmax(points.sum(axis=1))]]
    while len(chosen) < min(PLACES, len(points)):
        away = np.min([np.hypot(*(points - one).T) for one in chosen], axis=0)
        chosen.append(points[np.argmax(away + 0.3 * points.sum(axis=1))])
    return [(float(x), float(y)) for x, y in chosen]
