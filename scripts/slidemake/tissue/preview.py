"""The preview of a tissue mask: the overview with its outline and a scale bar."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slidemake.tissue.pixels import grow

LINE, HALO = (0, 235, 60), (0, 60, 20)  # green is the one colour that no stain has


def draw_preview(rgb: np.ndarray, mask: np.ndarray, mpp: float, longest: int = 1024) -> Image.Image:
    """Overview (h, w, 3) uint8 at `mpp` um/px with the outline of `mask` (h, w) bool, `longest` px a side or less.

    A small overview is enlarged to half of that, so that line and scale bar do not hide it.
    """
    height, width = mask.shape
    scale = float(np.clip(1.0, longest / 2 / max(height, width), longest / max(height, width)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BILINEAR
    picture = np.array(Image.fromarray(rgb).resize(size, how))
    small = np.array(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, how)) > 127
    edge = grow(small, 1) & ~small
    picture[grow(edge, 1)] = HALO
    picture[edge] = LINE
    image = Image.fromarray(picture)
    _scale_bar(image, mpp * width / size[0])
    return image


def _scale_bar(image: Image.Image, mpp: float) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten mm, at most a quarter of the picture, bottom left."""
    limit_mm = image.width * mpp / 1000 / 4
    if limit_mm <= 0:
        return
    power = 10.0 ** np.floor(np.log10(limit_mm))
    length_mm = max(step * power for step in (1, 2, 5) if step * power <= limit_mm)
    pixels, text = round(length_mm * 1000 / mpp), f"{length_mm:g} mm"
    font = ImageFont.load_default(size=max(9, min(18, image.height // 12)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    box_height = bottom - top + 16
    y = image.height - box_height - 6
    draw.rectangle((6, y, 6 + max(pixels, right - left) + 12, y + box_height), fill="white", outline="black")
    draw.text((12, y + 2 - top), text, fill="black", font=font)
    draw.rectangle((12, y + box_height - 8, 12 + pixels, y + box_height - 5), fill="black")
