"""The report's section on drift: new slides beside the training slides of the bundle that was applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.files import read_json_if_whole
from slidemake.report.figures import COLOURS, as_svg, blank_figure

NAMES = {
    "failed": "slides that failed",
    "embedding mmd": "embeddings: MMD²",
    "embedding frechet": "embeddings: Fréchet distance²",
    "embedding outside": "patients outside of what training saw",
    "abstained": "undecided patients",
}


def drift_section(results: Path) -> dict[str, Any] | None:
    """drift.json arranged as a table of measures (rows) and groups (columns); None where no bundle was applied."""
    drift = read_json_if_whole(results / "predictions" / "drift.json")
    if drift is None:
        return None
    groups = drift["groups"]
    measures = sorted({name for group in groups for name in group["measures"]}, key=_place)
    table = [
        {"name": _name(measure), "cells": [_cell(measure, group["measures"].get(measure)) for group in groups]}
        for measure in measures
    ]
    points = drift["points"]
    return {**drift, "table": table, "picture": embedding_map(points) if points["reference"] else None}


def _place(measure: str) -> tuple[int, str]:
    """Failures, embeddings, scores and decisions first, then the many figures of quality."""
    order = ("failed", "embedding", "score", "abstained", "quality")
    return order.index(measure.split()[0]), measure


def _name(measure: str) -> str:
    kind, _, rest = measure.partition(" ")
    if kind == "quality":
        return f"{rest.replace('_', ' ')} (KS)"
    return f"{rest.replace('prob_', 'probability of ')} (PSI)" if kind == "score" else NAMES.get(measure, measure)


def _cell(measure: str, figures: dict[str, Any] | None) -> dict[str, str]:
    if figures is None:
        return {"level": "", "text": "–", "beside": ""}
    if "share_new" in figures:
        text = f"{figures['share_new']:.0%}"
        beside = f"training {figures['share_reference']:.0%}"
    else:
        text, beside = f"{figures['value']:.3g}", f"chance {figures['expected']:.2g} to {figures['limit']:.2g}"
    if "median_new" in figures:
        beside += f"; median {figures['median_reference']:.3g} → {figures['median_new']:.3g}"
    return {"level": figures["level"], "text": text, "beside": f"{beside}; p {figures['p_corrected']:.2g}"}


def embedding_map(points: dict[str, Any]) -> str:
    """Patients in the first two principal directions of the training patients, new ones coloured by site."""
    figure, axes = blank_figure(5.2, 3.8)
    x, y = zip(*points["reference"], strict=True)
    axes.scatter(x, y, s=16, color="#b8bec8", linewidths=0, label=f"training ({len(x)})")
    for place, (site, rows) in enumerate(sorted(points["new"].items())):
        if rows:
            x, y = zip(*rows, strict=True)
            colour = COLOURS[place % len(COLOURS)]
            axes.scatter(x, y, s=24, color=colour, linewidths=0, alpha=0.85, label=f"{site or 'new'} ({len(x)})")
    axes.set_xlabel("first principal direction of training patients")
    axes.set_ylabel("second")
    axes.legend(fontsize=8)
    return as_svg(figure)
