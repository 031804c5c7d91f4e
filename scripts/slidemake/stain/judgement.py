"""Is a stain fit fit for use? What a transform would do to a slide is measured first, and what fails is not done.

A fit can be right as arithmetic and senseless as colour: where eosin is hardly there, Macenko's second vector is a
shade of haematoxylin, and to bring "its" maximum to the reference's tears nuclei and glass apart. So a slide is brought
to the reference by both stains, or by the one that it has, or left as it is; which, and why, is part of the transform.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np

from slidemake.stain.colour import TISSUE_OD, lab_to_linear, optical_density, rgb_to_lab
from slidemake.stain.fit import StainTransform, apply_stain_numpy, rounded, stain_transform
from slidemake.stain.vectors import RUIFROK, angle_degrees

# Limits were set between H&E of five laboratories (colon, kidney, brain, prostate, OpenSlide's CMU-1) and colon made
# darker, on which both stains can be told (vectors at most 11 and 12 degrees from Ruifrok's in red and green; maxima
# moved by at most 2.6; clear pixels darker by at most 0.10), and tissue on which they cannot: lung with hardly any
# eosin, two frozen sections, colon made pale (eosin at least 16 degrees; one maximum moved 3 to 6 times as far as the
# other; 0.13 and more).
MAX_ANGLE = {"haematoxylin": 20.0, "eosin": 15.0}  # degrees to Ruifrok's in red and green; blue differs by dye
MAX_RATIO = 3.0  # factor on a stain's maximum, up or down; and of one stain's factor to the other's
MAX_LEAVING = 0.01  # share of tissue pixels that would leave 0..255
MAX_GLASS = 0.12  # what the mean optical density of nearly clear pixels (below TISSUE_OD) may gain
MIN_GLASS = 10  # nearly clear pixels of the sample that this needs
EOSIN_RATIO, HAEMATOXYLIN_RATIO = 0.45, 0.4  # red/green density of the pinkest and the bluest twentieth of tissue
SAMPLE = 2048  # pixels kept of a slide to measure on
REASONS = {
    "eosin_weak": "hardly any eosin",
    "haematoxylin_weak": "hardly any haematoxylin",
    "vectors": "a stain's colour is too far from haematoxylin's or eosin's",
    "maxima": "one stain would be strengthened or weakened too much",
    "range": "too many pixels would leave 0 to 255",
    "glass": "the glass would be tinted",
    "single_stain": "one stain only",
    "not_he": "the second stain absorbs like DAB, or like haematoxylin itself",
    "too_few_pixels": "too little tissue",
}


def describe_pixels(pixels: np.ndarray, white_point: Any) -> dict[str, Any]:
    """What is kept of a slide's pooled pixels (n, 3) uint8 for the judgement, JSON-able; {} without tissue.

    `haematoxylin`, `eosin`: whether each is there, by the red/green density of the bluest and the pinkest twentieth.
    `vector`, `maximum`: the tissue's mean colour, and how much of it there is beside Ruifrok's vector of the stain that
    is not there. `sample`: RGB of evenly taken pixels, base64.
    """
    od = optical_density(pixels, np.asarray(white_point, np.float64))
    tissue = od[od.mean(axis=1) >= TISSUE_OD]
    if not len(tissue):
        return {}
    pinkest, bluest = np.percentile(tissue[:, 0] / np.maximum(tissue[:, 1], 0.01), (5, 95))
    vector = tissue.mean(axis=0) / np.linalg.norm(tissue.mean(axis=0))
    there = {"haematoxylin": bool(bluest >= HAEMATOXYLIN_RATIO), "eosin": bool(pinkest <= EOSIN_RATIO)}
    even = np.linspace(0, len(pixels) - 1, min(len(pixels), SAMPLE)).round().astype(int)
    return {
        **there,
        "vector": rounded(vector),
        "maximum": rounded([np.percentile(tissue @ _dual(vector, there), 99)])[0],
        "sample": base64.b64encode(np.ascontiguousarray(pixels[even]).tobytes()).decode(),
    }


def _dual(vector: np.ndarray, there: dict[str, Any]) -> np.ndarray:
    """(3,) whose product with a density is the amount of `vector`, apart from the stain that is not there: what little
    there is of that one, as in erythrocytes, then counts for nothing and is not changed.
    """
    other = RUIFROK[1 if there["haematoxylin"] else 0]
    return np.linalg.pinv(np.stack([vector, other]))[:, 0]


def hue_angle(vector: Any, stain: str) -> float:
    """Degrees between a stain vector (3,) and Ruifrok's, in the plane of red and green density."""
    known = RUIFROK[0 if stain == "haematoxylin" else 1]
    return angle_degrees(np.asarray(vector)[:2], known[:2])


def fit_reasons(fit: dict[str, Any]) -> list[str]:
    """Why a fit (a stain.json record) is of no use for both stains, whatever the reference: keys of REASONS."""
    tissue = fit.get("tissue") or {}
    found = [f"{stain}_weak" for stain in MAX_ANGLE if not tissue.get(stain, True)]
    if fit["stain_matrix"] and any(
        hue_angle(vector, stain) > MAX_ANGLE[stain]
        for vector, stain in zip(fit["stain_matrix"], MAX_ANGLE, strict=True)
    ):
        found.append("vectors")
    return found


def judged_transform(fit: dict[str, Any], target: dict[str, Any]) -> StainTransform:
    """The transform that is applied to a slide: of both stains, of one, or none, with `judgement` and `reason`.

    `fit` is stain.json, `target` the reference. One stain alone is normalised where the other is too weak to be fitted
    and the result passes the same tests. A slide that is left alone has status none and keeps method and target.
    """
    both = stain_transform(fit, target)
    if target["status"] == "none":
        return both
    found: dict[str, Any] = {}
    reasons = [str(both.reason)] if both.status == "none" else fit_reasons(fit)
    if both.status == "ok":
        found, failed = _measured(both, fit, _scales(fit, target))
        reasons = list(dict.fromkeys([*reasons, *failed]))
        if not reasons:
            return dataclasses.replace(both, applied="both", judgement=found)
    alone = _alone(fit, target)
    if alone:
        transform, stain, scale = alone
        single, failed = _measured(transform, fit, [scale])
        if not failed:
            why = " ".join(reasons)
            return dataclasses.replace(transform, applied=stain, reason=why, judgement=found | {"alone": single})
    left = StainTransform(target["method"], target=target["hash"], reason=" ".join(reasons))
    return dataclasses.replace(left, judgement=found)


def _scales(fit: dict[str, Any], target: dict[str, Any]) -> list[float]:
    keys = ("lab_std", "lab_std") if target["method"] == "reinhard" else ("max_concentrations", "max_concentrations")
    return [float(t / f) for f, t in zip(fit[keys[0]], target[keys[1]], strict=True)]


def _alone(fit: dict[str, Any], target: dict[str, Any]) -> tuple[StainTransform, str, float] | None:
    """Transform of the only stain of a slide: its colour becomes the reference's, what is not of it stays."""
    tissue = fit.get("tissue") or {}
    present = [stain for stain in MAX_ANGLE if tissue.get(stain)]
    if target["method"] == "reinhard" or len(present) != 1 or fit.get("reason") not in (None, "single_stain"):
        return None
    row = list(MAX_ANGLE).index(present[0])
    vector = np.asarray(tissue["vector"])
    if hue_angle(vector, present[0]) > MAX_ANGLE[present[0]]:
        return None
    scale = target["max_concentrations"][row] / tissue["maximum"]
    matrix = np.eye(3) + np.outer(_dual(vector, tissue), scale * np.asarray(target["stain_matrix"][row]) - vector)
    transform = StainTransform(
        target["method"],
        "ok",
        target["hash"],
        None,
        tuple(fit["white_point"]),
        tuple(target["white_point"]),
        tuple(rounded(line) for line in matrix),
    )
    return transform, present[0], float(scale)


def _measured(transform: StainTransform, fit: dict[str, Any], scales: list[float]) -> tuple[dict[str, Any], list[str]]:
    """Figures of what a transform does to the slide's sample, and which of them are beyond their limits."""
    found: dict[str, Any] = {"ratios": [round(scale, 3) for scale in scales]}
    if fit["stain_matrix"]:
        angles = zip(fit["stain_matrix"], MAX_ANGLE, strict=True)
        found["angles"] = [round(hue_angle(vector, stain), 1) for vector, stain in angles]
    sample = (fit.get("tissue") or {}).get("sample")
    if sample:
        pixels = np.frombuffer(base64.b64decode(sample), np.uint8).reshape(-1, 3)
        found |= effects(pixels, transform)
    factors = [*scales, scales[0] / scales[-1]] if transform.method != "reinhard" else scales
    failed = {
        "maxima": any(not 1 / MAX_RATIO <= factor <= MAX_RATIO for factor in factors),
        "range": found.get("leaving", 0.0) > MAX_LEAVING,
        "glass": (found.get("glass") or 0.0) > MAX_GLASS,
    }
    return found, [reason for reason, true in failed.items() if true]


def effects(pixels: np.ndarray, transform: StainTransform) -> dict[str, Any]:
    """`leaving`: share of tissue pixels (n, 3) that would leave 0..255. `glass`: density that clear ones gain."""
    od = optical_density(pixels, np.asarray(transform.white_point))
    tissue = od.mean(axis=1) >= TISSUE_OD
    if transform.method == "reinhard":
        outside = _outside_reinhard(pixels, transform)
    else:
        after = np.asarray(transform.target_white_point) * np.exp(-od @ np.asarray(transform.matrix))
        outside = ((after > 260.0) | ((after < 0.5) & (pixels > 1))).any(axis=1)
    glass = ~tissue
    clear = pixels[glass]
    gain = None
    if len(clear) >= MIN_GLASS:
        changed = apply_stain_numpy(np.concatenate([clear, pixels[tissue]])[None, None], transform)[0, 0, : len(clear)]
        density = optical_density(changed, np.full(3, 255.0)).mean(axis=1)
        gain = round(float((density - od[glass].mean(axis=1)).mean()), 4)
    return {"leaving": round(float(outside[tissue].mean()), 4) if tissue.any() else 0.0, "glass": gain}


def _outside_reinhard(pixels: np.ndarray, transform: StainTransform) -> np.ndarray:
    """(n,) True where the moved CIELAB colour is none of RGB by more than 2 % of linear light."""
    balanced = np.minimum(pixels * (255.0 / np.asarray(transform.white_point)), 255.0)
    scale = np.asarray(transform.target_lab_std) / np.asarray(transform.lab_std)
    moved = (rgb_to_lab(balanced) - np.asarray(transform.lab_mean)) * scale + np.asarray(transform.target_lab_mean)
    linear = lab_to_linear(moved)
    return np.asarray(((linear < -0.02) | (linear > 1.02)).any(axis=1))


def columns_of(transform: dict[str, Any]) -> dict[str, Any]:
    """Columns of slides.csv: `stain_applied` (both, haematoxylin, eosin, none) and what it rests on."""
    found = transform["judgement"] or {}
    angles, ratios = found.get("angles") or ["", ""], found.get("ratios") or ["", ""]
    row = {"stain_applied": transform["applied"], "stain_reason": transform["reason"] or ""}
    if transform["method"] != "reinhard":
        row |= {f"stain_angle_{stain}": angle for stain, angle in zip(MAX_ANGLE, angles, strict=True)}
        row |= {f"stain_ratio_{stain}": ratio for stain, ratio in zip(MAX_ANGLE, ratios, strict=True)}
    gain = found.get("glass")
    return row | {"stain_leaving": found.get("leaving", ""), "stain_glass": "" if gain is None else gain}


def in_words(reasons: str) -> str:
    """Reasons of a transform (keys of REASONS, with blanks between them) for people; others as they are."""
    return ", ".join(REASONS.get(reason, reason) for reason in reasons.split(" "))
