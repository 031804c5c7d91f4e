"""A linear model on mean embeddings, patients held out: what the probes of `shortcuts` and of stain are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from slidemake.statistics.class_metrics import auroc_auprc

FOLDS = 5
COMPONENTS = 32  # principal components that probes see: more than enough for a handful of sites, and fast


def reduce_vectors(vectors: np.ndarray) -> np.ndarray:
    """(S, K) principal components of the standardised vectors; fitted on all slides, without labels.

    They keep their spread: a linear model then sees what it would see in the vectors themselves. With all components
    made equal, as many of noise as there are slides hide the few in which site or label show.
    """
    scaled = StandardScaler().fit_transform(vectors)
    count = max(1, min(COMPONENTS, len(vectors) - 1, vectors.shape[1]))
    return PCA(count, svd_solver="full").fit_transform(scaled)


def logistic_probe() -> Any:
    return LogisticRegression(C=0.1, class_weight="balanced", max_iter=300)


def held_out_scores(
    make: Callable[[], Any], x: np.ndarray, y: np.ndarray, fold: np.ndarray, classes: int
) -> np.ndarray:
    """(S, C) probabilities of slides whose fold was held out; NaN where the training side lacks a second class."""
    scores = np.full((len(y), classes), np.nan)
    for f in np.unique(fold):
        train, test = fold != f, fold == f
        if len(np.unique(y[train])) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a probe that has not converged is a probe all the same
            model = make().fit(x[train], y[train])
        scores[test] = 0.0
        scores[np.ix_(test, model.classes_)] = model.predict_proba(x[test])
    return scores


def macro_auroc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) AUROC, one-versus-rest for more than two classes."""
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    return np.mean([auroc_auprc(y == c, scores[:, c], weights)[0] for c in classes], axis=0)


def random_folds(y: np.ndarray, seed: int, count: int) -> np.ndarray:
    """(n,) fold of each of n patients of class y (n,), every class dealt evenly."""
    fold = np.zeros(len(y), int)
    rng = np.random.default_rng(seed)
    for c in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == c))
        fold[members] = (np.arange(len(members)) + rng.integers(count)) % count
    return fold
