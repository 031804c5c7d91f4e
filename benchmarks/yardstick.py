"""The plainest attention MIL on the features and folds of a run: a yardstick that shares no training with slidemake.

Gated attention as in Ilse, Tomczak and Welling (2018): every tile of one bag a step, AdamW, a fixed number of epochs,
no inner validation, no ensemble. Every other choice has to earn its place against it. Beside it, tiles told apart by a
linear model that is shown the true masks: what the features allow at best.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

REPEATS = 2  # of the folds, at most: more cost minutes and move the mean little
EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 20, 2e-4, 1e-2
HIDDEN, ATTENTION, DROPOUT = 256, 128, 0.25


@dataclass(frozen=True)
class Bag:
    """A patient with one slide: `features` (N, D) float32, `tumour` (N,) share of each tile, `label` 0 or 1."""

    name: str
    features: np.ndarray
    tumour: np.ndarray
    label: int


class GatedAttention(torch.nn.Module):
    """A bag (N, D) to a logit and the attention (N,)."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = torch.nn.Sequential(torch.nn.Linear(dim, HIDDEN), torch.nn.ReLU(), torch.nn.Dropout(DROPOUT))
        self.what, self.gate = torch.nn.Linear(HIDDEN, ATTENTION), torch.nn.Linear(HIDDEN, ATTENTION)
        self.weigh, self.classify = torch.nn.Linear(ATTENTION, 1), torch.nn.Linear(HIDDEN, 1)

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.project(tiles)
        scores = self.weigh(torch.tanh(self.what(hidden)) * torch.sigmoid(self.gate(hidden))).squeeze(-1)
        attention = torch.softmax(scores, 0)
        return self.classify(attention @ hidden).squeeze(), attention


def train(bags: Sequence[Bag], seed: int = 0, epochs: int = EPOCHS) -> tuple[GatedAttention, np.ndarray, np.ndarray]:
    """A model of `bags`, with the mean and deviation (D,) by which it wants features standardised."""
    every = np.concatenate([bag.features for bag in bags])
    mean, deviation = every.mean(0), every.std(0) + 1e-6
    torch.manual_seed(seed)
    model, rng = GatedAttention(every.shape[1]), np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    tiles = [torch.from_numpy((bag.features - mean) / deviation) for bag in bags]
    truth = [torch.tensor(float(bag.label)) for bag in bags]
    for _ in range(epochs):
        for i in rng.permutation(len(bags)):
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(tiles[i])[0], truth[i]).backward()
            optimiser.step()
    return model.eval(), mean, deviation


def scores(bags: Sequence[Bag], folds: Sequence[Mapping[str, int]]) -> tuple[float, float | None]:
    """(AUROC of bags, mean AUROC of attention against tumour): each bag scored by the model of the fold that did not
    see it, averaged over the first `REPEATS` repeats. `folds`: per repeat, the fold of each bag by its name."""
    labels, aurocs, found = np.array([bag.label for bag in bags]), [], []
    for of in folds[:REPEATS]:
        fold, logits = np.array([of[bag.name] for bag in bags]), np.zeros(len(bags))
        for k in np.unique(fold):
            model, mean, deviation = train([bag for bag, f in zip(bags, fold, strict=True) if f != k])
            with torch.no_grad():
                for i in np.flatnonzero(fold == k):
                    logit, attention = model(torch.from_numpy((bags[i].features - mean) / deviation))
                    logits[i] = float(logit)
                    if (figure := tile_auroc(bags[i].tumour, attention.numpy())) is not None:
                        found.append(figure)
        aurocs.append(roc_auc_score(labels, logits))
    return float(np.mean(aurocs)), float(np.mean(found)) if found else None


def supervised_tiles(bags: Sequence[Bag], folds: Mapping[str, int]) -> float | None:
    """AUROC of tiles that are nearly all tumour against those nearly without, told apart by logistic regression on the
    true masks of the other folds' bags."""
    truth, told = [], []
    for k in sorted(set(folds.values())):
        sides = [[bag for bag in bags if (folds[bag.name] == k) is tested] for tested in (False, True)]
        (x, share), (x_tested, share_tested) = (
            (np.concatenate([bag.features for bag in side]), np.concatenate([bag.tumour for bag in side]))
            for side in sides
        )
        clear, clear_tested = ((s > 0.9) | (s < 0.1) for s in (share, share_tested))
        if len(np.unique(share[clear] > 0.5)) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
        model.fit(x[clear], share[clear] > 0.5)
        told.append(model.decision_function(x_tested[clear_tested]))
        truth.append(share_tested[clear_tested] > 0.5)
    if not truth or len(np.unique(np.concatenate(truth))) < 2:
        return None
    return float(roc_auc_score(np.concatenate(truth), np.concatenate(told)))


def tile_auroc(tumour: np.ndarray, score: np.ndarray) -> float | None:
    """AUROC of a score (N,) for tiles that are tumour for more than half; None where there are none, or only such."""
    truth = tumour > 0.5
    return float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else None


def share_of_tiles(mask: np.ndarray, coords: np.ndarray, side: int, cell: int) -> np.ndarray:
    """(N,) share of each tile that a mask covers. `mask`: bool, one px per `cell` level-0 px; `coords` (N, 2) x, y of
    the tiles' corners and `side` of the tiles, in level-0 px."""
    parts = [mask[y // cell : -(-(y + side) // cell), x // cell : -(-(x + side) // cell)] for x, y in coords]
    return np.array([float(part.mean()) if part.size else 0.0 for part in parts])


def read_features(store: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) float32 and coords (N, 2) of an embedding store."""
    group = zarr.open_group(store, mode="r")
    return np.asarray(group["features"][:], np.float32), np.asarray(group["coords"][:])


def read_folds(splits: Path) -> list[dict[str, int]]:
    """Per repeat, the fold of each patient, from a task's splits.csv."""
    folds: dict[int, dict[str, int]] = {}
    with open(splits, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            folds.setdefault(int(row["repeat"]), {})[row["patient_id"]] = int(row["fold"])
    return [folds[repeat] for repeat in sorted(folds)]
