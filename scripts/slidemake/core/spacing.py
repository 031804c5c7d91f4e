"""Evenly spaced choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).astype(int)]
