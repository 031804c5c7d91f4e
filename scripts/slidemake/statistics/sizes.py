"""Groups that are too small for figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def too_few(patients: int, options: Mapping[str, Any]) -> str | None:
    """Why a group of so many patients gets no figures, or None."""
    needed = options["subgroup_patients"]
    return f"{patients} patients; {needed} are needed" if patients < needed else None
