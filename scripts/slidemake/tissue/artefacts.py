"""What is on a slide but is not tissue, or is tissue that was mounted badly: pen, padding, folds, bubbles.

The pen rules rest on which channels an ink absorbs. In haematoxylin, eosin, DAB and their mixtures green light is
absorbed at least as much as red (OD of H 0.65/0.70/0.29, E 0.07/0.99/0.11, DAB 0.27/0.57/0.78: Ruifrok & Johnston
2001), so what absorbs red clearly more than green is ink: green or teal when blue light is absorbed as well, blue when
it is not. Red ink is more saturated than eosin or blood at overview scale, black ink darker than packed nuclei.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage as ndi

from slidemake.tissue.pixels import (
    box_mean,
    channel_range,
    close_gaps,
    component_areas,
    dilate,
    grow,
    keep_components,
    shrink,
    thinned,
)

PEN_COLOURS = ("green", "blue", "red", "black")
MIN_PEN_UM2 = 20_000.0  # a stroke is a large coherent thing; single dark or blue pixels are nuclei


def black_areas(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: padding that a scanner or a format fills with black; grown by 2 px against JPEG ringing.

    Black is max(R, G, B) <= 12 in a piece that touches the border, or exactly 0, 0, 0 in a piece above 0.02 mm^2.
    """
    top = channel_range(rgb)[1]
    if not (top <= 12).any():
        return np.zeros(top.shape, bool)
    labels, count = ndi.label(top <= 12)
    sizes = component_areas(labels, count)
    wanted = np.bincount(labels[top == 0], minlength=count + 1) > 0.9 * sizes
    wanted |= np.isin(np.arange(count + 1), np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    wanted &= sizes * mpp**2 > MIN_PEN_UM2
    wanted[0] = False
    mask = wanted[labels]
    return grow(mask, 2) if mask.any() else mask


def pen_mask(
    od: Sequence[np.ndarray],
    colour: tuple[np.ndarray, np.ndarray, np.ndarray],
    usable: np.ndarray,
    mpp: float,
    pens: Sequence[str],
) -> np.ndarray:
    """(h, w) bool: marker strokes, on glass and on tissue.

    od: OD per channel; colour: hue, saturation, value (`hsv`), all of the median-filtered overview. A stroke is a
    core that no stain can give, with a minimum area after an opening, and the weaker ink connected to it.
    """
    hue, saturation, value = colour
    red, green, blue = od
    found = np.zeros(usable.shape, bool)
    if "green" in pens:
        # Thin ink is lighter than any rule for its full colour: what lets green through this freely is no stain.
        light = (red > 0.04) & (green < 0.7 * red) & (blue > 0.2 * red)
        strong = (red > 0.06) & (green < 0.88 * red) & (blue > 0.5 * red)
        weak = strong | light | ((red > 0.3) & (green < 0.96 * red) & (blue > 0.45 * red))
        found |= _strokes((strong & (red > 0.2)) | (light & (red > 0.1) & (green < 0.62 * red)), weak, usable, mpp)
    if "blue" in pens:
        pure = (green < 0.85 * red) & (blue < 0.5 * red)
        # Over tissue eosin adds to green, so there the lack of blue absorption decides (haematoxylin alone has 0.45).
        over = (red > 0.6) & (blue < 0.36 * red) & (saturation > 150)
        light = (red > 0.04) & (green < 0.7 * red) & (blue <= 0.25 * red)  # thin ink, as with green
        strong = over | (pure & (red > 0.35) & (saturation > 100)) | (light & (red > 0.1) & (green < 0.62 * red))
        weak = strong | light | (pure & (red > 0.12) & (saturation > 60)) | ((red > 0.3) & (blue < 0.4 * red))
        found |= _strokes(strong, weak, usable, mpp, reach_um=400.0)
    if "red" in pens:
        reddish = (hue > 340) | (hue < 12)
        strong = ((hue > 345) | (hue < 12)) & (saturation > 195) & (value > 110)
        weak = reddish & ((saturation > 145) | ((saturation > 110) & (value > 215)))
        found |= _strokes(strong, weak, usable, mpp, reach_um=1500.0)
    if "black" in pens:
        # DAB at its densest is as dark as ink but brown.
        brown = (hue > 5) & (hue < 50) & (saturation > 60) & (value > 20)
        spread = saturation * value / 255  # max - min: the saturation of something nearly black is noise
        weak = (value < 95) & (spread < 50) & ~brown
        found |= _strokes(weak & (value < 60), weak, usable, mpp, reach_um=1500.0, min_um2=8_000.0)
    return found


def _strokes(
    strong: np.ndarray,
    weak: np.ndarray,
    usable: np.ndarray,
    mpp: float,
    reach_um: float | None = None,
    min_um2: float = MIN_PEN_UM2,
) -> np.ndarray:
    """Weak ink that is connected to (and, with `reach_um`, near) a core of strong ink that is large enough."""
    core = strong & usable
    if not core.any():
        return core
    half = min(2, int(16.0 / mpp))  # a nucleus is 1 px wide at 8 um/px; strokes are hundreds of um
    core = keep_components(grow(shrink(core, half), half) & core, min_um2 / mpp**2)
    if not core.any():
        return core
    ink = (weak & usable) | core
    if reach_um is not None:
        ink &= dilate(core, reach_um / mpp)
    labels, count = ndi.label(ink, structure=np.ones((3, 3), bool))
    connected = np.bincount(labels[core], minlength=count + 1) > 0
    connected[0] = False
    return connected[labels]


def followed_ink(od: Sequence[np.ndarray], pen: np.ndarray, usable: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: where strokes that were found on glass go on over tissue.

    Thin ink over tissue has the colour of tissue with more haematoxylin and less eosin, so that colour alone cannot
    tell. A stroke goes on in one piece and as wide as it was, and there the tissue is darker by the ink's own densities
    than the tissue beside it. Looked at in blocks of 24 um.
    """
    step = max(1, round(24.0 / mpp))
    height, width = (side // step for side in pen.shape)
    out = np.zeros_like(pen)
    if height < 8 or width < 8 or not pen.any():
        return out

    def blocks(values: np.ndarray) -> np.ndarray:
        cut = values[: height * step, : width * step].astype(np.float32)
        down = np.add.reduceat(cut, np.arange(0, height * step, step), axis=0)
        return np.add.reduceat(down, np.arange(0, width * step, step), axis=1) / step**2

    scale = mpp * step
    density = np.stack([blocks(channel) for channel in od], -1)
    ink, free = blocks(pen) > 0.5, blocks(usable) > 0.99
    tissue = free & ~ink & (density.sum(-1) > 0.1)
    labels, count = ndi.label(ink, structure=np.ones((3, 3), bool))
    inner = shrink(ink, 1)
    inside = component_areas(labels * inner, count)
    inks: list[tuple[np.ndarray, np.ndarray]] = []  # colour, and the strokes of it
    for label in np.flatnonzero(inside[1:] * scale**2 >= MIN_PEN_UM2) + 1:
        stroke = labels == label
        amounts = density[stroke & inner]
        thinnest = amounts.sum(-1) <= np.median(amounts.sum(-1))  # where it lies on glass
        colour = np.median(amounts[thinnest], axis=0)
        alike = [strokes for other, strokes in inks if np.linalg.norm(colour - other) < 0.3 * np.linalg.norm(other)]
        if alike:
            alike[0] |= stroke
        else:
            inks.append((colour, stroke))
    found = np.zeros_like(ink)
    for colour, strokes in inks:
        edge = max(1, int((strokes & ~inner).sum()))
        wide = 2 * int(strokes.sum()) / edge  # an edge of one block on both sides
        smooth = np.stack([box_mean(density[..., c], max(80.0 / scale, 0.5 * wide)) for c in range(3)], -1)
        found |= _going_on(smooth, colour, strokes, tissue, wide, 75.0 / scale)
    out[: height * step, : width * step] = np.repeat(np.repeat(found, step, 0), step, 1)
    return out & usable


def _going_on(
    density: np.ndarray, colour: np.ndarray, stroke: np.ndarray, tissue: np.ndarray, wide: float, gap: float
) -> np.ndarray:
    """Tissue that is darker than the tissue around by `colour`, in bands of the stroke's width that begin at it."""
    band = np.zeros_like(stroke)
    for _ in range(2):  # the second time, what was found is not among the tissue around
        beside = tissue & ~band
        weight = box_mean(beside.astype(np.float32), 6 * wide)
        around = np.stack(
            [box_mean(density[..., c] * beside, 6 * wide) / np.maximum(weight, 1e-3) for c in range(3)], -1
        )
        more = density - around
        share = more @ colour / float(colour @ colour)
        rest = np.linalg.norm(more - share[..., None] * colour, axis=-1) / float(np.linalg.norm(colour))
        alike = tissue & (share > 0.4) & (share < 2.0) & (rest < 0.4) & (weight > 0.02)
        reach = max(1.0, 0.2 * wide)
        alike = grow(shrink(alike, reach), reach) & alike
        alike &= ~grow(shrink(alike, 0.9 * wide), 0.9 * wide)  # wider than any stroke: a region of the tissue
        joined = close_gaps(alike | dilate(stroke, gap + 1), wide)
        labels, count = ndi.label(joined, structure=np.ones((3, 3), bool))
        begun = np.bincount(labels[stroke], minlength=count + 1) > 0
        begun[0] = False
        band = begun[labels] & alike
    return band


def border_strips(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: strips of one flat colour along a whole side that end in a straight line: the edge of a label.

    rgb (h, w, 3) uint8, median-filtered. What is printed on a strip belongs to it.
    """
    found = np.zeros(rgb.shape[:2], bool)
    step = max(1, round(24.0 / mpp))
    for turns in range(4):  # the side that is looked at is on the left
        view: np.ndarray = np.rot90(found, turns)  # a view: writing to it writes to `found`
        widths = _strip(np.rot90(rgb[::step, ::step], turns), mpp * step)
        if widths is not None:
            rows = widths[np.minimum(np.arange(view.shape[0]) // step, len(widths) - 1)] * step
            view |= np.arange(view.shape[1])[None, :] < rows[:, None]
    return found


def _strip(rgb: np.ndarray, mpp: float) -> np.ndarray | None:
    """How wide the strip at the left border is, (h,) px, or None where there is none."""
    widest, outer = int(0.3 * rgb.shape[1]), max(3, round(80.0 / mpp))
    if widest <= 2 * outer:
        return None
    border = rgb[:, :outer].reshape(-1, 3)
    bins = (border >> 4).astype(np.int32) @ np.array([256, 16, 1])
    colour = np.median(border[bins == np.bincount(bins).argmax()], axis=0)
    colour = np.median(border[np.abs(border - colour).max(1) <= 20], axis=0)  # the bins' bounds may cut it
    if colour.min() >= 254 or colour.max() <= 12:  # painted where nothing was scanned
        return None
    near = rgb[:, :widest].astype(np.int16) - colour.astype(np.int16)
    low, high = channel_range(near)
    alike = (low >= -14) & (high <= 14)
    if alike[:, :outer].mean() < 0.5:
        return None
    alike = close_gaps(alike, 300.0 / mpp)  # over what is printed
    ends = np.where(alike.all(1), widest, np.argmin(alike, axis=1))
    third = max(1, len(ends) // 3)
    first, last = np.median(ends[:third]), np.median(ends[-third:])
    line = first + (last - first) * (np.arange(len(ends)) - third / 2) / max(1, len(ends) - third)
    if np.median(ends) * mpp < 150 or np.median(ends) > 0.9 * widest or (np.abs(ends - line) * mpp < 60).mean() < 0.85:
        return None
    beyond = np.clip(ends + max(1, round(40.0 / mpp)), 0, widest - 1)
    step = np.abs(near[np.arange(len(ends)), beyond]).max(-1)
    if np.median(step) < 17:  # 3 grey levels more than at the edge; shading changes by less than one over 40 um
        return None
    return line + 50.0 / mpp


def fold_mask(od: Sequence[np.ndarray], saturation: np.ndarray, tissue: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: tissue lying double: dense and saturated beyond the rest of this slide's tissue, in its hue.

    A fold doubles every stain, so the OD sum must pass 1.7 times the slide's median and three robust standard
    deviations, and the colour must stay the slide's own: DAB and lymphoid tissue are dense in another hue. Single
    nuclei vanish by smoothing over 48 um and an area of 0.005 mm^2.
    """
    if int(tissue.sum()) < 64:
        return np.zeros_like(tissue)
    density = box_mean(od[0] + od[1] + od[2], 48.0 / mpp)
    step = thinned(tissue.size)
    inner = tissue[step, step]
    inside = density[step, step][inner]
    if inside.size < 16:
        return np.zeros_like(tissue)
    middle = float(np.median(inside))
    spread = 1.4826 * float(np.median(np.abs(inside - middle)))
    folds = tissue & (density > max(1.7 * middle, middle + 3 * spread))
    if not folds.any():
        return folds
    local = [box_mean(channel, 48.0 / mpp) for channel in od]
    shift = np.zeros(folds.shape, np.float32)
    for channel in local:
        share = channel / np.maximum(density, np.float32(0.01))
        shift += np.abs(share - np.median(share[step, step][inner]))
    vivid = box_mean(saturation, 48.0 / mpp)
    folds &= (shift < 0.12) & (vivid > np.percentile(vivid[step, step][inner], 75))
    return keep_components(folds, max(4.0, 5_000.0 / mpp**2))


def bubble_mask(
    total: np.ndarray, colour: np.ndarray, tissue: np.ndarray, usable: np.ndarray, mpp: float
) -> np.ndarray:
    """(h, w) bool: air bubbles on glass: round, colourless, thin rims around an interior as empty as glass.

    Bubbles over tissue have no colourless rim at this scale and are not found.
    """
    rim = (total > 0.06) & (colour < 0.12) & usable & ~grow(shrink(tissue, 3), 3)
    labels, count = ndi.label(rim, structure=np.ones((3, 3), bool))
    found = np.zeros_like(tissue)
    if count == 0:
        return found
    sizes = component_areas(labels, count)
    for label, window in enumerate(ndi.find_objects(labels), start=1):
        height, width = (part.stop - part.start for part in window)
        if min(height, width) * mpp < 300 or not 0.6 < height / width < 1.67:
            continue
        if sizes[label] > 0.45 * height * width:
            continue
        ring = labels[window] == label
        disc = ndi.binary_fill_holes(ring)
        inside = disc & ~ring
        # A disc covers pi/4 of its box; a rim leaves most of it empty.
        round_enough = abs(disc.mean() - np.pi / 4) < 0.12
        if round_enough and inside.sum() > 0.4 * disc.sum() and float(np.median(total[window][inside])) < 0.06:
            found[window] |= disc
    return found


def glass_edges(labels: np.ndarray, sizes: np.ndarray, coloured: np.ndarray, mpp: float) -> np.ndarray:
    """(count + 1,) bool: components longer than ten times their width that are coverslip or scanner edges.

    Needle biopsies are as long: a piece goes only when it has no colour, or touches the border and is thin (< 150 um).
    """
    edge = np.zeros(len(sizes), bool)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    at_border = np.zeros(len(sizes), bool)
    at_border[touching] = True
    boxes = ndi.find_objects(labels)
    shares = np.bincount(labels[coloured], minlength=len(sizes)) / np.maximum(sizes, 1)
    for label in np.flatnonzero(sizes * mpp**2 > 5_000):
        if label == 0:
            continue
        window = boxes[label - 1]
        height, width = (part.stop - part.start for part in window)
        if sizes[label] > 0.35 * height * width and max(height, width) < 8 * min(height, width):
            continue
        y, x = np.nonzero(labels[window] == label)
        spread = np.cov(np.stack([y, x]).astype(np.float64)) if len(y) > 2 else np.eye(2)
        small, large = np.sqrt(12 * np.maximum(np.linalg.eigvalsh(spread), 1 / 12))
        if large > 10 * small:
            edge[label] = shares[label] < 0.3 or (at_border[label] and small * mpp < 150)
    return edge
