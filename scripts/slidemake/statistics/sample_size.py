"""What so many patients can tell: how well an AUROC will be known, which difference would be seen, how many it takes.

Before training these are the only figures there are. Widths and differences are of models as they were trained; those
for ways of training are wider by the factor that `auroc_intervals.training_part` names.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

AGREEMENT = 0.5  # correlation of two models' AUROCs on the same patients that is assumed where none is known


def auroc_variance(auroc: float, positives: int, negatives: int) -> float:
    """Hanley and McNeil 1982 (Radiology 143:29)."""
    q1, q2, a = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc), auroc
    spread = a * (1 - a) + (positives - 1) * (q1 - a**2) + (negatives - 1) * (q2 - a**2)
    return float(spread / (positives * negatives))


def auroc_precision(auroc: float, positives: int, negatives: int, level: float = 0.95) -> float:
    """Half the width of the interval that an AUROC of this size will have, about."""
    return float(norm.ppf((1 + level) / 2) * np.sqrt(auroc_variance(auroc, positives, negatives)))


def detectable_difference(
    auroc: float, positives: int, negatives: int, power: float = 0.8, level: float = 0.95, agree: float = AGREEMENT
) -> float:
    """Difference of two models' AUROCs on the same patients that is found with this power; agree: their correlation."""
    error = np.sqrt(2 * (1 - agree) * auroc_variance(auroc, positives, negatives))
    return float((norm.ppf((1 + level) / 2) + norm.ppf(power)) * error)


def patients_for_difference(
    difference: float, auroc: float, share: float, power: float = 0.8, level: float = 0.95, agree: float = AGREEMENT
) -> int:
    """Patients, a `share` of them positive, of whom a difference is found with this power; at most 10 million."""
    low, high = 4, 10_000_000
    while low < high:
        middle = (low + high) // 2
        positives = max(2, round(share * middle))
        found = detectable_difference(auroc, positives, max(2, middle - positives), power, level, agree)
        low, high = (low, middle) if found <= abs(difference) else (middle + 1, high)
    return low


def external_validation_size(share: float, auroc: float = 0.8, level: float = 0.95) -> dict[str, int]:
    """Patients that an external validation wants (Riley et al. 2021, Statistics in Medicine 40:4230), for the ratio of
    observed to expected (interval of its logarithm 0.51 wide, as from 0.8 to 1.3), and for an AUROC known to 0.05."""
    z = float(norm.ppf((1 + level) / 2))
    of_ratio = int(np.ceil((1 - share) / (share * (0.51 / (2 * z)) ** 2)))
    n = 10
    while auroc_precision(auroc, max(1, round(n * share)), max(1, n - round(n * share)), level) > 0.05:
        n = int(np.ceil(n * 1.02)) + 1
    return {"observed_to_expected": of_ratio, "auroc": n}
