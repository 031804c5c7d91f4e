"""The report's part on comparing models: the table by rank, the diagram of critical differences, the axes of sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.files import read_json_if_whole
from slidemake.report.figures import COLOURS, as_svg, blank_figure

MOST = 24  # models in the diagram, best first


def comparison_section(folder: Path) -> dict[str, Any] | None:
    """comparison.json of a task with its pictures; None where there is one model only."""
    result = read_json_if_whole(folder / "comparison.json")
    if result is None or len(result["models"]) < 2:
        return None
    pictures = [("Average rank over folds; models joined by a bar cannot be told apart", rank_diagram(result))]
    pictures += [(f"By {axis}", axis_figure(values, result["metric"])) for axis, values in result["axes"].items()]
    return {**result, "pictures": [(caption, source) for caption, source in pictures if source]}


def rank_diagram(result: dict[str, Any]) -> str | None:
    """Demsar's diagram: models on a line of average ranks, bars over models within the critical difference."""
    ranked = [(row["model"], row["rank"]) for row in result["models"] if row["rank"] is not None][:MOST]
    if not ranked:
        return None
    figure, axes = blank_figure(7.2, 1.1 + 0.2 * len(ranked) + 0.13 * len(result["cliques"]))
    names, ranks = [name for name, _ in ranked], np.array([rank for _, rank in ranked])
    high = max(len(result["models"]), 2)
    half = (len(names) + 1) // 2
    top = 0.35 + 0.3 * len(result["cliques"])
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = i < half
        level = -(i if left else len(names) - 1 - i) - 1
        edge = 1 - 0.04 * high if left else high + 0.04 * high
        axes.plot([rank, rank, edge], [0, level, level], color="#9aa0a6", linewidth=0.9)
        axes.text(
            edge,
            level,
            f"{name}  {rank:.2f} " if left else f" {rank:.2f}  {name}",
            va="center",
            ha="right" if left else "left",
            fontsize=8,
        )
    for number, clique in enumerate(result["cliques"]):
        inside = [rank for name, rank in ranked if name in clique]
        if len(inside) > 1:
            y = 0.3 + 0.3 * number
            axes.plot([min(inside) - 0.02 * high, max(inside) + 0.02 * high], [y, y], color=COLOURS[0], linewidth=3)
    axes.plot([1, 1 + result["critical_difference"]], [top + 0.6, top + 0.6], color="#3c4043", linewidth=1.4)
    axes.text(1, top + 0.75, f"critical difference {result['critical_difference']:.2f}", fontsize=8, va="bottom")
    axes.scatter(ranks, np.zeros(len(ranks)), s=16, color=COLOURS[0], zorder=3)
    axes.axhline(0, color="#3c4043", linewidth=1)
    axes.set_xlim(1 - 0.05 * high, high + 0.05 * high)
    axes.set_ylim(-half - 1, top + 1.6)
    axes.set_yticks([])
    axes.set_xlabel("average rank (1 is best)")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    return as_svg(figure)


def axis_figure(values: list[dict[str, Any]], metric: str) -> str | None:
    """Mean figure of the models that share a value of an axis, with the range over them."""
    if len(values) < 2:
        return None
    figure, axes = blank_figure(4.6, 0.7 + 0.3 * len(values))
    for place, row in enumerate(reversed(values)):
        axes.plot([row["low"], row["high"]], [place, place], color=COLOURS[0], linewidth=2, alpha=0.4)
        axes.plot(row["mean"], place, "o", color=COLOURS[0], markersize=5)
        axes.annotate(
            f"{row['mean']:.2f}", (row["mean"], place), (0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(values)), [f"{row['value']} ({row['models']})" for row in reversed(values)])
    axes.set_ylim(-0.6, len(values) - 0.2)
    axes.set_xlabel(f"mean {metric.upper()} of the models (line: lowest to highest)")
    axes.grid(axis="y", visible=False)
    return as_svg(figure)
