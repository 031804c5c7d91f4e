"""Estimates of the two stain vectors from optical densities, float64 and deterministic."""

from __future__ import annotations

import numpy as np

# Ruifrok & Johnston (2001): optical density of haematoxylin and of eosin in red, green and blue.
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
RUIFROK = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
DICTIONARY_PIXELS = 20_000
SPARSITY = 0.1


def angle_degrees(first: np.ndarray, second: np.ndarray) -> float:
    """Angle between two vectors."""
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def concentrations(od: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Least-squares amounts (n, 2) of the stains `vectors` (2, 3) in densities `od` (n, 3)."""
    return od @ np.linalg.pinv(vectors)


def haematoxylin_first(vectors: np.ndarray) -> np.ndarray:
    """(2, 3) rows of unit length, the one that absorbs more red first."""
    ordered = vectors if vectors[0, 0] > vectors[1, 0] else vectors[::-1]
    return ordered / np.linalg.norm(ordered, axis=1, keepdims=True)


def macenko_vectors(od: np.ndarray, percentile: float = 99.0) -> np.ndarray:
    """Macenko's vectors (2, 3): extreme angles, at `percentile`, in the plane of greatest variance of `od` (n, 3)."""
    _, vectors = np.linalg.eigh(np.cov(od, rowvar=False))
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane[0] < 0, -1.0, 1.0)
    projected = od @ plane
    angles = np.percentile(np.arctan2(projected[:, 1], projected[:, 0]), (100.0 - percentile, percentile))
    return haematoxylin_first(np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T)


def vahadane_vectors(od: np.ndarray, sparsity: float = SPARSITY, iterations: int = 500) -> np.ndarray:
    """Vahadane's vectors (2, 3): minimise |OD - C S|^2 / 2 + sparsity |C|_1 over C >= 0, S >= 0 with unit rows.

    Alternates the exact non-negative lasso for two atoms with block coordinate descent on the dictionary (Mairal et
    al. 2010), from Ruifrok's vectors, on an even subsample, until the vectors stand still.
    """
    od = od[np.linspace(0, len(od) - 1, min(len(od), DICTIONARY_PIXELS)).round().astype(int)]
    atoms = RUIFROK
    for _ in range(iterations):
        before = atoms
        codes = _lasso_two_atoms(od, atoms, sparsity)
        gram, cross = codes.T @ codes, codes.T @ od
        atoms = atoms.copy()
        for k in range(2):
            if gram[k, k] < 1e-9:
                continue  # an atom that nothing uses stays where it is
            moved = np.maximum(atoms[k] + (cross[k] - gram[k] @ atoms) / gram[k, k], 0.0)
            atoms[k] = moved / max(np.linalg.norm(moved), 1e-12)
        if np.abs(atoms - before).max() < 1e-6:
            break
    return haematoxylin_first(atoms)


def _lasso_two_atoms(od: np.ndarray, atoms: np.ndarray, sparsity: float) -> np.ndarray:
    """Exact minimiser C >= 0 (n, 2) of |OD - C S|^2 / 2 + sparsity |C|_1 for unit rows S (2, 3)."""
    overlap = float(atoms[0] @ atoms[1])
    pull = od @ atoms.T - sparsity  # each atom alone would take max(pull, 0)
    both = (pull - overlap * pull[:, ::-1]) / max(1.0 - overlap**2, 1e-9)
    alone = np.maximum(pull, 0.0)
    first = pull[:, :1] >= pull[:, 1:]
    single = alone * np.concatenate([first, ~first], axis=1)
    return np.where((both > 0).all(axis=1, keepdims=True), both, single)
