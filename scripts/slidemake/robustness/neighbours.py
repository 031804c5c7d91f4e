"""Do slides lie near others of the same class, or near others of the same site? On mean embeddings, without training.

Of two slides, SO are those of the same class from another site, OS those of another class from the same site. The
robustness index (PathoROB, arXiv 2507.17845) is the share of SO among the SO and OS neighbours of all slides; CRoMa
(arXiv 2607.25497) is, per slide, how much nearer the nearest SO are than the nearest OS. Both are 1 when only the class
matters; the index is 0 and CRoMa negative when only the site does. Neighbours are by cosine, never of the same patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

M = 5  # nearest slides of each kind that CRoMa averages
MOST_NEIGHBOURS = 50  # largest k tried
TAIL = 0.1  # share of the least robust slides in CRoMa's lower-tail mean
BLOCK = 256  # slides whose neighbours are sorted at a time


def _codes(values: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(values), return_inverse=True)[1]


def _neighbours(vectors: np.ndarray, patients: Sequence[str]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(slide, its neighbours from near to far, their cosine distances), those of the same patient left out."""
    unit = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12)
    of = _codes(patients)
    for start in range(0, len(unit), BLOCK):
        distance = 1 - unit[start : start + BLOCK] @ unit.T
        order = np.argsort(distance, axis=1, kind="stable")
        for row in range(len(order)):
            ranked = order[row][of[order[row]] != of[start + row]]
            yield start + row, ranked, np.maximum(0.0, distance[row, ranked])


def embedding_robustness(
    vectors: np.ndarray, classes: Sequence[str], sites: Sequence[str], patients: Sequence[str]
) -> dict[str, Any]:
    """Robustness index and CRoMa of slides (S, D) with their classes, sites and patients.

    `index` is taken at the `k` whose neighbours tell the class best (balanced accuracy of their vote); `index_support`
    is the share of slides with an SO or OS neighbour there. `croma` has `median`, `tail` (mean of the lowest tenth),
    `share_site` (slides that are nearer to their site) and `support` (slides with 5 of each kind). None, with a reason,
    without two classes and two sites, or where no slide has both kinds.
    """
    y, s = _codes(classes), _codes(sites)
    nothing: dict[str, Any] = {"index": None, "k": None, "index_support": None, "croma": None}
    if len(y) < 3 or y.max() < 1 or s.max() < 1:
        return {**nothing, "reason": "fewer than two classes or two sites"}
    most = min(MOST_NEIGHBOURS, len(y) - 1)
    so, os_ = np.zeros((len(y), most), bool), np.zeros((len(y), most), bool)
    votes = np.zeros((most, len(y)), int)
    margins = np.full(len(y), np.nan)
    for i, ranked, distance in _neighbours(vectors, patients):
        is_so, is_os = (y[ranked] == y[i]) & (s[ranked] != s[i]), (y[ranked] != y[i]) & (s[ranked] == s[i])
        count = min(most, len(ranked))
        so[i, :count], os_[i, :count] = is_so[:count], is_os[:count]
        tally = np.cumsum(y[ranked[:count], None] == np.arange(y.max() + 1), axis=0)
        if count:
            votes[:count, i] = tally.argmax(1)
            votes[count:, i] = votes[count - 1, i]
        near, far = distance[is_so][:M], distance[is_os][:M]
        if len(near) == M and len(far) == M and near.sum() + far.sum() > 0:
            margins[i] = (far.mean() - near.mean()) / (far.mean() + near.mean())
    accuracy = np.mean([(votes[:, y == c] == c).mean(1) for c in range(y.max() + 1)], axis=0)
    k = int(accuracy.argmax()) + 1
    n_so, n_os = so[:, :k].sum(1), os_[:, :k].sum(1)
    total = int(n_so.sum() + n_os.sum())
    return {
        "index": float(n_so.sum() / total) if total else None,
        "k": k,
        "index_support": float(((n_so + n_os) > 0).mean()),
        "croma": _summary(margins),
        "reason": None if total else "no neighbour of either kind: label and site are the same partition",
    }


def _summary(margins: np.ndarray) -> dict[str, float] | None:
    known = margins[np.isfinite(margins)]
    if not len(known):
        return None
    return {
        "median": float(np.median(known)),
        "tail": float(known[known <= np.percentile(known, 100 * TAIL)].mean()),
        "share_site": float((known <= 0).mean()),
        "support": float(len(known) / len(margins)),
    }
