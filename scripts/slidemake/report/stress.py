"""The report's part on stress tests: the metric against the severity of each corruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.files import read_json_if_whole
from slidemake.report.figures import COLOURS, STYLE, as_svg
from slidemake.robustness.corruptions import SEVERITIES
from slidemake.tasks.base import NO_SKILL, SCORES


def stress_section(folder: Path) -> dict[str, Any] | None:
    """stress.json of a model with its picture; None where it was not tested under stress."""
    result = read_json_if_whole(folder / "stress.json")
    if result is None:
        return None
    if not result["points"]:
        return None
    return {
        **result,
        "title": SCORES[result["headline"]],
        "picture": severity_figure(result["points"], result["headline"]),
    }


def severity_figure(points: list[dict[str, Any]], metric: str) -> str | None:
    """A small panel per corruption: the metric with its interval at severities 0 to 3."""
    known = [p for p in points if p["metrics"][metric]["value"] is not None]
    kinds = list(dict.fromkeys(p["corruption"] for p in known if p["severity"]))
    if not kinds:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(1.75 * len(kinds) + 0.6, 2.5), sharey=True, layout="constrained", squeeze=False
    )
    clean = next(p for p in known if not p["severity"])
    for axes, kind in zip(panels[0], kinds, strict=True):
        of_kind = [clean, *(p for p in known if p["corruption"] == kind)]
        x = [p["severity"] for p in of_kind]
        values = [p["metrics"][metric] for p in of_kind]
        axes.fill_between(x, [v["low"] for v in values], [v["high"] for v in values], color=COLOURS[0], alpha=0.15)
        axes.plot(x, [v["value"] for v in values], "o-", color=COLOURS[0], markersize=4)
        axes.axhline(NO_SKILL[metric], color="#9aa0a6", linestyle=":", linewidth=1)
        axes.set_title(kind, fontsize=9)
        axes.set_xticks(range(4), ["as is", *(f"{amount:g}" for amount in SEVERITIES[kind][1])], fontsize=7)
        axes.set_xlabel(
            SEVERITIES[kind][0].replace(" by this share", "").replace(" against what was asked for", ""), fontsize=7
        )
    panels[0][0].set_ylabel(SCORES[metric])
    panels[0][0].set_ylim(top=1.02)
    return as_svg(figure)
