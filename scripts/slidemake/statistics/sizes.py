"""What a sample's size allows: groups that are too small for figures, bins that hold enough patients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_BIN = 5  # patients a calibration bin should hold on average: fewer bins in small samples


def bins_for(n: int, asked: int) -> int:
    """Calibration bins for n patients: as asked, but never so many that they hold fewer than 5 patients on average."""
    return max(2, min(asked, n // PER_BIN))


def too_few(patients: int, options: Mapping[str, Any]) -> str | None:
    """Why a group of so many patients gets no figures, or None."""
    needed = options["subgroup_patients"]
    return f"{patients} patients; {needed} are needed" if patients < needed else None
