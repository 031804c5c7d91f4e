"""Comparing the models of a task: one table, average ranks over folds, and the difference between ranks that counts.

Ranks rather than figures are averaged, because folds differ in difficulty. Friedman's test asks whether any model
differs; the critical difference is Nemenyi's, CD = q sqrt(k (k + 1) / (6 N)) with q from the studentised range (Demsar
2006, JMLR 7:1-30). Folds of one cohort share training patients and are not N independent data sets: N is replaced by
1 / (1/J + n_test/n_train) (the correction of Nadeau and Bengio 2003), which is about 3 for 15 folds of a 5-fold
cross-validation. So the test is cautious: models of one clique may well differ, and the paired intervals of the metrics
table say more about any two of them. Controls take no part. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import rankdata, studentized_range

COLUMNS = ("model", "metric", "value", "low", "high", "rank", "cliques", "reason")


def fold_table(metrics: Mapping[str, Any], models: Sequence[str], metric: str) -> tuple[np.ndarray, list[str]]:
    """Figures (folds, models) of one metric, NaN where it is not defined, and the names of the folds."""
    scopes = [metrics["models"][model]["scopes"] for model in models]
    folds = [name for name in scopes[0] if name.startswith("fold:") and all(name in other for other in scopes)]
    table = np.full((len(folds), len(models)), np.nan)
    for i, fold in enumerate(folds):
        for j, of_model in enumerate(scopes):
            value = (of_model[fold]["metrics"].get(metric) or {}).get("value")
            table[i, j] = np.nan if value is None else value
    return table, folds


def average_ranks(table: np.ndarray, lower_is_better: bool = False) -> np.ndarray:
    """(models,) mean rank over folds, 1 the best, ties sharing; table (folds, models) without undefined figures."""
    return rankdata(table if lower_is_better else -table, axis=1).mean(0)


def friedman(table: np.ndarray, blocks: float) -> float | None:
    """p of Friedman's test in Iman and Davenport's form for average ranks that rest on `blocks` independent folds."""
    ranks = rankdata(-table, axis=1)
    k, mean = ranks.shape[1], ranks.mean(0)
    spread = ((ranks - (k + 1) / 2) ** 2).sum(1).mean() / (k - 1)  # k (k + 1) / 12 without ties
    if spread <= 0 or blocks <= 1:
        return None
    chi = blocks * ((mean - (k + 1) / 2) ** 2).sum() / spread
    if chi >= blocks * (k - 1):
        return 0.0
    statistic = (blocks - 1) * chi / (blocks * (k - 1) - chi)
    return float(f_distribution.sf(statistic, k - 1, (k - 1) * (blocks - 1)))


def critical_difference(models: int, blocks: float, level: float = 0.95) -> float:
    """Nemenyi's critical difference of average ranks."""
    q = studentized_range.ppf(level, models, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(models * (models + 1) / (6 * blocks)))


def cliques(ranks: np.ndarray, difference: float) -> list[list[int]]:
    """Largest groups of models whose average ranks lie within `difference`, best first; models as indices."""
    order = np.argsort(ranks, kind="stable")
    found: list[list[int]] = []
    for i in range(len(order)):
        group = [int(m) for m in order[i:] if ranks[m] - ranks[order[i]] <= difference + 1e-12]
        if len(group) > 1 and not (found and set(group) <= set(found[-1])):
            found.append(group)
    return found


def effective_blocks(folds: int, test: float, train: float) -> float:
    """Independent folds that `folds` overlapping ones are worth: 1 / (1/J + test/train)."""
    return 1 / (1 / folds + test / train)


def compare(
    metrics: Mapping[str, Any],
    metric: str,
    level: float = 0.95,
    table_axes: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """The models of metrics.json beside each other: rows (best average rank first), critical difference, cliques, axes.

    table_axes: {model: {axis: value}} of sweeps, for the mean figure of each value of each axis.
    """
    models = [name for name, entry in metrics["models"].items() if not entry["control"] and "chosen" not in entry]
    rows = [_row(metrics, model, metric) for model in models]
    result: dict[str, Any] = {"metric": metric, "level": level, "models": rows, "cliques": [], "reason": None}
    result |= {"folds": 0, "blocks": None, "critical_difference": None, "friedman_p": None}
    result["axes"] = axis_means(rows, table_axes or {})
    table, folds = fold_table(metrics, models, metric)
    whole = np.isfinite(table).all(1)
    table, used = table[whole], [fold for fold, keep in zip(folds, whole, strict=True) if keep]
    if len(models) < 2 or len(table) < 2:
        few = "one model" if len(models) < 2 else f"{len(table)} folds in which every model has a figure"
        return {**result, "reason": f"ranks are not compared: {few}"}
    ranks = average_ranks(table)
    tested = float(np.mean([metrics["models"][models[0]]["scopes"][fold]["n"] for fold in used]))
    rest = metrics["patients"] - tested
    blocks = effective_blocks(len(table), tested, rest) if rest > 0 else 1.0
    difference = critical_difference(len(models), blocks, level)
    groups = cliques(ranks, difference)
    for i, row in enumerate(rows):
        row |= {"rank": float(ranks[i]), "cliques": [number for number, group in enumerate(groups) if i in group]}
    return {
        **result,
        "models": sorted(rows, key=lambda row: (row["rank"], row["model"])),
        "folds": len(table),
        "blocks": blocks,
        "critical_difference": difference,
        "friedman_p": friedman(table, blocks),
        "cliques": [[models[i] for i in group] for group in groups],
    }


def _row(metrics: Mapping[str, Any], model: str, metric: str) -> dict[str, Any]:
    found = metrics["models"][model]["scopes"]["pooled"]["metrics"].get(metric) or {}
    figures = {key: found.get(key) for key in ("value", "low", "high", "reason")}
    return {"model": model, **figures, "rank": None, "cliques": []}


def axis_means(rows: Sequence[Mapping[str, Any]], table_axes: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """{axis: [{value, models, mean, low, high}]}: the mean figure of the models that share a setting, and its range."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for axis, value in table_axes.get(row["model"], {}).items():
            figures = found.setdefault(axis, {}).setdefault(value, [])
            if row["value"] is not None:
                figures.append(row["value"])
    return {
        axis: [
            {"value": value, "models": len(f), "mean": float(np.mean(f)), "low": min(f), "high": max(f)}
            for value, f in sorted(values.items(), key=lambda item: -float(np.mean(item[1] or [-np.inf])))
            if f
        ]
        for axis, values in found.items()
    }


def comparison_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of comparison.csv."""
    return [
        {
            "model": row["model"],
            "metric": result["metric"],
            **{key: "" if row[key] is None else f"{row[key]:.6g}" for key in ("value", "low", "high", "rank")},
            "cliques": " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] for i in row["cliques"]),
            "reason": row["reason"] or result["reason"] or "",
        }
        for row in result["models"]
    ]
