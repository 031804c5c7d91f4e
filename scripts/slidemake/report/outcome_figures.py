"""Figures of the report for tasks that are no plain classes, as SVG text (see `figures.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidemake.report.figures import COLOURS, as_svg, blank_figure

GROUPS = (("low", COLOURS[0]), ("high", COLOURS[1]))


def kaplan_meier(groups: dict[str, Any], unit: str) -> str:
    """Survival of the patients above and below the threshold from validation, with numbers at risk."""
    figure, axes = blank_figure(6.2, 3.9)
    longest = max(group["curve"]["time"][-1] for group in groups.values())
    at = np.linspace(0, longest, 6)
    names = [name for name, _ in GROUPS if name in groups]
    for name, colour in GROUPS:
        if name not in groups:
            continue
        group, curve = groups[name], {key: np.array(column) for key, column in groups[name]["curve"].items()}
        label = f"{name} risk ({group['events']} events in {group['n']})"
        axes.step(curve["time"], curve["survival"], where="post", color=colour, linewidth=2, label=label)
        axes.fill_between(
            curve["time"], curve["low"], curve["high"], step="post", color=colour, alpha=0.12, linewidth=0
        )
        drop = -0.27 - 0.07 * names.index(name)
        # at risk just before a time: those at risk at the first time from there on
        places = np.searchsorted(curve["time"][1:], at, side="left")
        counts = np.append(curve["at_risk"][1:], 0)[places]
        for t, count in zip(at, counts, strict=True):
            axes.text(
                t, drop, f"{count:.0f}", transform=axes.get_xaxis_transform(), ha="center", color=colour, fontsize=8
            )
    axes.text(0, -0.20, "at risk", transform=axes.get_xaxis_transform(), ha="center", color="#5f6368", fontsize=8)
    axes.set_xticks(at, [f"{t:.3g}" for t in at])
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"time ({unit})" if unit else "time")
    axes.xaxis.labelpad = 2
    axes.set_ylabel("without the event")
    axes.legend(fontsize=8, loc="lower left")
    axes.text(0, -0.36, " ", transform=axes.get_xaxis_transform())  # keeps room for the numbers
    return as_svg(figure)


def scatter(points: dict[str, Any], unit: str, model: str) -> str:
    """Prediction (mean over repeats) against truth, coloured by site, with the line of equality."""
    figure, axes = blank_figure(3.9, 3.7)
    truth, predicted, sites = np.array(points["truth"]), np.array(points["predicted"]), np.array(points["sites"])
    for i, site in enumerate(sorted(set(points["sites"]))):
        chosen = sites == site
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(
            truth[chosen], predicted[chosen], s=22, color=colour, alpha=0.75, linewidths=0, label=site or "no site"
        )
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], color="#9aa0a6", linestyle=":", linewidth=1)
    axes.set_xlabel(f"true value ({unit})" if unit else "true value")
    axes.set_ylabel(f"out-of-fold prediction ({model})")
    if len(set(points["sites"])) <= 8:
        axes.legend(fontsize=7.5)
    return as_svg(figure)


def confusion(table: list[list[float]], grades: list[str], model: str) -> str:
    """Decisions against truth, patients per repeat; the colour is the share of the true grade."""
    counts = np.array(table)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = blank_figure(0.55 * len(grades) + 2.2, 0.5 * len(grades) + 1.5)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
    for i in range(len(grades)):
        for j in range(len(grades)):
            colour = "white" if share[i, j] > 0.6 else "#3c4043"
            axes.text(j, i, f"{counts[i, j]:.3g}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(grades)), grades)
    axes.set_yticks(range(len(grades)), grades)
    axes.grid(visible=False)
    axes.set_xlabel(f"predicted ({model})")
    axes.set_ylabel("true grade")
    return as_svg(figure)
