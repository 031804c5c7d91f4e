"""Heatmaps over the slide and galleries of tiles, drawn with Pillow and matplotlib's colour maps.

A tile is drawn as the square that it is: smoothing a heatmap invents detail that the model never saw.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

from slidemake.core.files import write_image

WIDTH = 1200  # px of the slide in a heatmap; a tall slide is bounded by MAX_HEIGHT instead
MAX_HEIGHT = 1400
MARGIN = 24
COLOURS = "viridis"  # perceptually ordered, safe for colour-blind readers, and far from the pink and violet of H&E
OPACITY = 0.5
GREYED = 0.8  # how much of the stain's colour gives way under the overlay
INK, QUIET, PAPER = (28, 28, 32), (96, 96, 104), (255, 255, 255)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def save(image: Image.Image, path: str | Path) -> None:
    """Write PNG or JPEG by the name's ending; whole or not at all."""
    kind = {".png": "PNG", ".jpg": "JPEG"}[Path(path).suffix.lower()]
    # the smallest PNG (level 9) is a tenth smaller and took three quarters of the time of explaining a slide
    options = {"compress_level": 4} if kind == "PNG" else {"quality": 88, "subsampling": 0}
    write_image(path, image, format=kind, **options)


def round_length(longest: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above `longest`."""
    power = 10.0 ** math.floor(math.log10(longest))
    return max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9))


def length_text(um: float) -> str:
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def scale_bar(draw: ImageDraw.ImageDraw, x: float, y: float, um_per_px: float, room: float, size: int = 16) -> float:
    """Draw a scale bar of a round length, at most `room` px, with its left end at (x, y); returns its length in px."""
    um = round_length(room * um_per_px)
    length = um / um_per_px
    draw.rectangle((x, y, x + length, y + 5), fill=INK)
    draw.text((x + length / 2, y + 10), length_text(um), font=font(size), fill=INK, anchor="ma")
    return length


def tile_raster(
    coords: np.ndarray, tile_px: tuple[float, float], scores: np.ndarray, shape: tuple[int, int], sx: float, sy: float
) -> np.ndarray:
    """Mean score of the tiles that cover each pixel, (h, w) float, NaN where there is none.

    coords (N, 2) and tile_px (w, h) in level-0 px; sx, sy level-0 px per pixel. Neighbouring tiles share their edge:
    no gaps and no double lines. NaN scores are not drawn.
    """
    height, width = shape
    total, count = np.zeros(shape), np.zeros(shape, np.int32)
    left, top = np.asarray(coords, float).reshape(-1, 2).T
    x0, x1 = np.rint(left / sx).astype(int), np.rint((left + tile_px[0]) / sx).astype(int)
    y0, y1 = np.rint(top / sy).astype(int), np.rint((top + tile_px[1]) / sy).astype(int)
    x0, y0 = np.clip(x0, 0, width), np.clip(y0, 0, height)
    x1, y1 = np.clip(np.maximum(x1, x0 + 1), 0, width), np.clip(np.maximum(y1, y0 + 1), 0, height)
    for i in np.flatnonzero(np.isfinite(scores)):
        total[y0[i] : y1[i], x0[i] : x1[i]] += scores[i]
        count[y0[i] : y1[i], x0[i] : x1[i]] += 1
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


def _resized(overview: np.ndarray) -> Image.Image:
    height, width = overview.shape[:2]
    zoom = min(WIDTH / width, MAX_HEIGHT / height)
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    return Image.fromarray(overview).resize(size, Image.Resampling.LANCZOS if zoom > 1 else Image.Resampling.BOX)


def overlay(picture: np.ndarray, percentile: np.ndarray) -> np.ndarray:
    """Colour (h, w) percentiles (0..100, NaN none) over an RGB picture (h, w, 3) uint8, half transparent.

    Under the colour the stain is mostly taken out: violet nuclei under violet, or pink under yellow, give colours that
    are not on the scale. Structure stays, as lightness.
    """
    known = np.isfinite(percentile)
    colour = colormaps[COLOURS](np.where(known, percentile, 0) / 100)[..., :3] * 255
    grey = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    under = GREYED * grey + (1 - GREYED) * picture
    mixed = np.where(known[..., None], (1 - OPACITY) * under + OPACITY * colour, picture)
    return np.rint(mixed).astype(np.uint8)


def _colour_bar(draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int, length: int, label: str) -> None:
    """Horizontal bar 0..100 as the colours look over pale tissue, with ticks and its label above."""
    bar = overlay(np.full((16, length, 3), 190, np.uint8), np.tile(np.linspace(0, 100, length), (16, 1)))
    draw.text((x, y), label, font=font(16), fill=INK)
    image.paste(Image.fromarray(bar), (x, y + 26))
    for tick in (0, 25, 50, 75, 100):
        at = x + round(tick / 100 * (length - 1))
        draw.line((at, y + 42, at, y + 47), fill=INK)
        anchor = "la" if tick == 0 else "ra" if tick == 100 else "ma"
        draw.text((at, y + 49), str(tick), font=font(14), fill=INK, anchor=anchor)


def render_heatmap(
    overview: np.ndarray,
    coords: np.ndarray,
    tile_level0_px: tuple[float, float],
    percentile: np.ndarray,
    out: str | Path,
    *,
    sx: float,
    sy: float,
    mpp: float | None,
    title: str = "",
    label: str = "attention (percentile in slide); sensitivity, not causality",
) -> None:
    """Heatmap over the whole slide as PNG, about 1200 px wide.

    overview (h, w, 3) uint8, the slide seen from afar; coords (N, 2) top-left corners and tile_level0_px (w, h) in
    level-0 px; percentile (N,) 0..100 or NaN; sx, sy level-0 px per overview px; mpp um per level-0 px or None (no
    scale bar). N may be 0: the slide is shown with a note.
    """
    base = _resized(overview)
    ratio_x, ratio_y = sx * overview.shape[1] / base.width, sy * overview.shape[0] / base.height
    raster = tile_raster(coords, tile_level0_px, percentile, (base.height, base.width), ratio_x, ratio_y)
    picture = Image.fromarray(overlay(np.asarray(base, np.uint8), raster))
    head = 44 if title else MARGIN
    width = max(base.width, 760) + 2 * MARGIN
    sheet = Image.new("RGB", (width, head + base.height + 108), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = (width - base.width) // 2
    if title:
        draw.text((MARGIN, 12), shortened(title, font(17, True), width - 2 * MARGIN), font=font(17, True), fill=INK)
    sheet.paste(picture, (left, head))
    draw.rectangle((left - 1, head - 1, left + base.width, head + base.height), outline=(200, 200, 204))
    below = head + base.height + 16
    if np.isfinite(percentile).any():
        _colour_bar(draw, sheet, MARGIN, below, 480, label)
    else:
        draw.text((MARGIN, below), "no tile of this slide has a score", font=font(16), fill=INK)
    if mpp:
        per_px = mpp * ratio_x
        room = min(200.0, base.width / 3)
        um = round_length(room * per_px)
        scale_bar(draw, width - MARGIN - max(um / per_px, 30), below + 26, per_px, room)
    save(sheet, out)


def shortened(text: str, face: ImageFont.FreeTypeFont, room: float) -> str:
    """Text that fits `room` px: its middle gives way, because names differ at their ends."""
    if face.getlength(text) <= room:
        return text
    keep = len(text)
    while keep > 2 and face.getlength(text[: keep // 2] + "…" + text[len(text) - keep // 2 :]) > room:
        keep -= 1
    return text[: keep // 2] + "…" + text[len(text) - keep // 2 :]


def render_gallery(
    tiles: np.ndarray,
    captions: list[tuple[str, str, str]],
    out: str | Path,
    *,
    mpp: float | None,
    name: str,
    title: str,
    note: str = "",
) -> None:
    """Tiles (k, H, W, 3) uint8 in a grid as JPEG; one scale bar for all (um).

    captions: (bold, right of it, below) per tile; name (a slide's, shortened when long) and title head the picture;
    mpp: um per pixel of the tiles, or None (no scale bar). k may be 0.
    """
    cell, gap, caption, top, k = 224, 14, 44, 74, len(tiles)
    columns = 4 if k <= 4 or k in (7, 8) else 5
    rows = max(1, math.ceil(k / columns))
    width = 2 * MARGIN + columns * cell + (columns - 1) * gap
    body = rows * (cell + caption + gap) if k else 40
    sheet = Image.new("RGB", (width, top + body + 58), PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, plain, room = font(17, True), font(17), width - 2 * MARGIN
    name = shortened(name, bold, room - plain.getlength(f": {title}"))
    draw.text((MARGIN, 14), name, font=bold, fill=INK)
    draw.text((MARGIN + bold.getlength(name), 14), f": {title}", font=plain, fill=INK)
    draw.text((MARGIN, 42), shortened(note, font(14), room), font=font(14), fill=QUIET)
    for i in range(k):
        x, y = MARGIN + (i % columns) * (cell + gap), top + (i // columns) * (cell + caption + gap)
        sheet.paste(Image.fromarray(tiles[i]).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=(200, 200, 204))
        draw.text((x, y + cell + 4), captions[i][0], font=font(15, True), fill=INK)
        draw.text((x + cell, y + cell + 4), captions[i][1], font=font(15), fill=INK, anchor="ra")
        draw.text((x, y + cell + 24), shortened(captions[i][2], font(13), cell), font=font(13), fill=QUIET)
    if not k:
        draw.text((MARGIN, top), "no tiles", font=font(16), fill=INK)
    elif mpp:
        scale_bar(draw, MARGIN, top + body + 8, mpp * tiles.shape[2] / cell, cell / 1.5)
    save(sheet, out)
