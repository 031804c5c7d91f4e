"""Files of weights, read as plain tensors and never as a pickle that runs."""

from __future__ import annotations

import numpy as np


def focus(grey: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of (H, W) uint8; 0 when a side is below 3 px."""
    if min(grey.shape) < 3:
        return 0.0
    plane = np.ascontiguousarray(grey).astype(np.int16)
    laplacian = plane[:-2, 1:-1] + plane[2:, 1:-1]
    laplacian += plane[1:-1, :-2]
    laplacian += plane[1:-1, 2:]
    laplacian -= 4 * plane[1:-1, 1:-1]
    values = laplacian.astype(np.float32).ravel()
    return float(np.dot(values, values) / values.size - values.mean(dtype=np.float64) ** 2)
