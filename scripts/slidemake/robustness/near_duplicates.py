"""Slides that look the same and lie on both sides of a split: copies, re-scans and re-exports under another patient.

Slides are compared by the cosine of their mean tile embedding. Two figures, because encoders differ in how alike all
slides are to them: the cosine itself, which is near 1 for a copy and, with some encoders, for any two slides of one
stain; and the cosine after the cohort's mean is taken off, which is near 0 for two slides that have nothing in common.
With the default encoder and 14 composed slides of real tiles, different slides reach at most 0.96 and 0.51; the same
slide saved again as JPEG of quality 80 0.998 and 0.97, as one of quality 50 0.96 and 0.68, brightened by 5 % 0.99 and
0.88, on another scanner 0.99 and 0.88.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.mil.bags import Bags
from slidemake.splits.patients import Splits

ALIKE = 0.85  # centred cosine above which a pair is shown
ENOUGH = 8  # slides below which taking off their mean says nothing
MOST = 50  # pairs that are kept in the report
BLOCK = 1024  # slides compared at a time


def slide_means(bags: Bags) -> tuple[list[int], np.ndarray]:
    """Indices of the slides that have tiles, and their mean embeddings (S, D) float64."""
    chosen = (i for first, last in sorted(bags.where.values()) for i in range(first, last))
    kept = [i for i in chosen if bags.offsets[i + 1] > bags.offsets[i]]
    means = np.empty((len(kept), bags.dim))
    for row, i in zip(means, kept, strict=True):
        bags.slide(i).mean(0, dtype=np.float64, out=row)
        bags.forget()
    return kept, means


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _pairs(means: np.ndarray, floor: float, alike: float) -> Iterator[tuple[int, int, float, float | None]]:
    """(i, j, cosine, centred cosine) of i < j with cosine above `floor` or centred cosine above `alike`."""
    raw, centred = _unit(means), _unit(means - means.mean(0))
    count = len(means)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        near, apart = raw[block] @ raw.T, centred[block] @ centred.T
        later = np.arange(count)[None, :] > np.arange(start, start + len(near))[:, None]
        chosen = near > floor
        if count >= ENOUGH:
            chosen |= apart > alike
        for i, j in np.argwhere(chosen & later):
            yield start + int(i), int(j), float(near[i, j]), float(apart[i, j]) if count >= ENOUGH else None


def near_duplicates(bags: Bags, splits: Splits, threshold: float | None) -> dict[str, Any]:
    """Pairs of slides of two patients who are trained and tested on in one repeat, and look the same.

    A pair is a copy when its cosine exceeds `threshold` and, in cohorts of 8 slides or more, its centred cosine 0.85;
    None looks for none. Returns {"threshold", "slides", "copies", "alike"}, each pair as {"slides", "patients",
    "cosine", "centred", "repeat", "folds"}, most alike first.
    """
    kept, means = slide_means(bags.of_patients(splits.labels))
    copies: list[dict[str, Any]] = []
    alike: list[dict[str, Any]] = []
    for i, j, cosine, centred in _pairs(means, threshold or 2.0, ALIKE):
        one, two = bags.patients[kept[i]], bags.patients[kept[j]]
        apart = [r for r, of in sorted(splits.folds.items()) if one in of and two in of and of[one] != of[two]]
        if one == two or not apart:
            continue
        pair = {
            "slides": [bags.slides[kept[i]], bags.slides[kept[j]]],
            "patients": [one, two],
            "cosine": round(cosine, 6),
            "centred": None if centred is None else round(centred, 4),
            "repeat": apart[0],
            "folds": [splits.folds[apart[0]][p] for p in (one, two)],
        }
        copy = threshold is not None and cosine > threshold and (centred is None or centred > ALIKE)
        (copies if copy else alike).append(pair)
    for pairs in (copies, alike):
        pairs.sort(key=lambda pair: (-pair["cosine"], pair["slides"]))
    return {
        "threshold": threshold,
        "slides": len(kept),
        "copies": copies[:MOST],
        "alike": [pair for pair in alike if pair["centred"] is not None and pair["centred"] > ALIKE][:MOST],
        "counts": {"copies": len(copies), "alike": sum((pair["centred"] or 0) > ALIKE for pair in alike)},
    }


def stop_at_copies(found: dict[str, Any]) -> None:
    """RunError that names the pairs, when there are any."""
    if not found["copies"]:
        return
    shown = "; ".join(
        f"{' and '.join(pair['slides'])} (patients {' and '.join(pair['patients'])}, folds "
        f"{' and '.join(pair['folds'])}, cosine {pair['cosine']:.5f})"
        for pair in found["copies"][:5]
    )
    raise RunError(
        f"Leak: slides that look identical are trained and tested on: {shown}. Pairs whose mean embeddings have a "
        f"cosine above {found['threshold']}: {found['counts']['copies']}. If they show one specimen, give them one "
        "patient_id, or exclude one (column exclude). If they do not, raise splits.near_duplicate, or set it to null."
    )


def warnings_of(found: dict[str, Any]) -> list[str]:
    """What to say about pairs that are much alike without being copies."""
    if not found["alike"]:
        return []
    pair = found["alike"][0]
    return [
        f"{found['counts']['alike']} pairs of slides of different patients in different folds are much alike (first: "
        f"{' and '.join(pair['slides'])}, cosine {pair['cosine']:.4f}, and {pair['centred']:.2f} after the cohort's "
        "mean is taken off): see whether they are re-scans of one specimen"
    ]
