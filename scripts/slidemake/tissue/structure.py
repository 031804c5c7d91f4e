"""What has structure on an overview: nuclei, fibres and membranes have it at 2 to 16 um, smear and glass do not.

Colour alone takes washed-out eosin for tissue and leaves out fat, whose cells are as empty as glass; structure alone
takes dust and scratches for tissue. `tissue` lets both decide. Everything here is measured on the OD sum less its mean
over 64 um (the detail; over 24 um for lines), against the slide's own noise, so that a dim or noisy scan is treated
like a clean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi

from slidemake.tissue.pixels import TINY, box_mean, close_gaps, component_areas, grow, shrink, thin_parts

DETAIL_UM, LINE_UM, FINE_UM, LACE_UM = 64.0, 24.0, 40.0, 136.0
# Measured at 8 um/px, spread of the detail over 40 um: glass 0.003, a halo of eosin 0.003 to 0.005, printed dots 0.007,
# strokes of ink 0.007 to 0.02; fat 0.018, pale haematoxylin 0.026, other tissue 0.1 to 0.5.
FINE = 0.014
LINE = 0.004  # detail of the membrane of a fat cell
NOISE_FACTOR = (2.5, 3.5)  # how far above the slide's noise texture, and a single line, must be
LACE = 0.22  # share of such lines within 136 um: fat 0.3 to 0.6, glass with dust up to 0.15
EMPTY = 0.04  # OD sum of what is as good as glass
FAT_EMPTY = 0.35  # share of empty pixels within 136 um above which lines are the membranes of fat cells
LACE_COLOUR = 0.03  # (most - least) / sum of the three channels' detail: fat 0.05 to 0.16, scratches and dust 0.01

PEAKED = 2.5  # RMS over mean of the detail: fat 1.7 to 2.4, glass with specks of dust more
MIN_FAT_UM2, MIN_LONE_FAT_UM2 = 100_000.0, 500_000.0  # smallest area of fat, beside other tissue and alone


@dataclass(frozen=True)
class Structure:
    """fine (h, w) float32: spread of the detail over 40 um; lines (h, w) bool: detail that noise does not explain; lace
    (h, w) float32: their share within 136 um; noise: spread of the detail on glass; textured (h, w) bool: fine is
    above what noise explains.
    """

    fine: np.ndarray
    lace: np.ndarray
    lines: np.ndarray
    noise: float
    textured: np.ndarray


def measure_structure(total: np.ndarray, usable: np.ndarray, mpp: float) -> Structure:
    """Structure of an overview at mpp um per px.

    total (h, w) float32: OD sum of the unfiltered overview, negative where brighter than the glass; usable (h, w) bool.
    """
    detail = total - box_mean(total, DETAIL_UM / mpp)
    fine = np.sqrt(np.maximum(box_mean(detail * detail, FINE_UM / mpp), 0))
    noise = _noise(fine, total, usable)
    sharp, line = total - box_mean(total, LINE_UM / mpp), max(LINE, NOISE_FACTOR[1] * noise)
    lace = box_mean((np.abs(sharp) > line).astype(np.float32), LACE_UM / mpp)
    return Structure(fine, lace, sharp > line, noise, fine > max(FINE, NOISE_FACTOR[0] * noise))


def _noise(fine: np.ndarray, total: np.ndarray, usable: np.ndarray) -> float:
    """Spread of the detail on glass: the lowest fifth of `fine` where the overview is as bright as glass."""
    step = max(1, int(np.sqrt(fine.size / 250_000)))
    glass = fine[::step, ::step][usable[::step, ::step] & (np.abs(total[::step, ::step]) < 0.06)]
    if glass.size < 0.005 * usable[::step, ::step].size or glass.size < 16:
        return 0.0
    # Over 25 pixels the lowest fifth lies a tenth below the spread itself.
    low, high = np.percentile(glass, (20, 80))
    # Noise is everywhere the same. Where pale tissue passes for glass, its texture must not pass for noise.
    return min(1.1 * float(low), 0.05 if high < 1.4 * low else 0.008)


def fat_mask(
    structure: Structure, od: Sequence[np.ndarray], total: np.ndarray, body: np.ndarray, usable: np.ndarray, mpp: float
) -> np.ndarray:
    """(h, w) bool: fat: a net of coloured membranes around cells that are as empty as glass.

    od: three (h, w) of the unfiltered overview; body: tissue that is dense or textured throughout. The window of 136 um
    reaches over the edge of what is dense, so that strips beside it are not fat: less than 120 um wide.
    """
    lace = (structure.lace > LACE) & usable
    if not lace.any():
        return lace
    lace &= box_mean((total < EMPTY).astype(np.float32), LACE_UM / mpp) > FAT_EMPTY
    lace &= ~(body & ~thin_parts(body, 32.0 / mpp))
    reach = max(1.0, 56.0 / mpp)
    lace = grow(shrink(lace, reach), reach) & lace
    labels, count = ndi.label(lace, structure=np.ones((3, 3), bool))
    if count == 0:
        return lace
    areas = component_areas(labels, count)
    wanted = areas * mpp**2 > MIN_FAT_UM2
    where = lace & structure.lines
    amounts, sharp = [], np.zeros(lace.shape, np.float32)
    for channel in od:
        detail = channel - box_mean(channel, LINE_UM / mpp)
        sharp += detail
        amounts.append(np.bincount(labels[where], np.maximum(detail[where], 0), minlength=count + 1))
    spread = np.max(amounts, axis=0) - np.min(amounts, axis=0)
    wanted &= spread > LACE_COLOUR * np.maximum(np.sum(amounts, axis=0), TINY)
    mean = np.bincount(labels[lace], np.abs(sharp[lace]), minlength=count + 1) / np.maximum(areas, 1)
    square = np.bincount(labels[lace], sharp[lace] ** 2, minlength=count + 1) / np.maximum(areas, 1)
    wanted &= np.sqrt(square) < PEAKED * mean
    wanted[0] = False
    # The window reaches over the outermost membranes; fat ends with them.
    fat = close_gaps(wanted[labels], 160.0 / mpp) & usable
    return close_gaps(structure.lines & fat, 160.0 / mpp) & fat
