"""The report's part on use: decisions at the frozen threshold, by site and at another prevalence, and what they are
worth."""

from __future__ import annotations

from typing import Any

from slidemake.report.figures import COLOURS, GREYS, as_svg, blank_figure
from slidemake.tasks.controls import REFERENCE

FIGURES = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "lr_positive": "LR+",
    "lr_negative": "LR-",
}


def clinical_section(metrics: dict[str, Any], main: str) -> dict[str, Any] | None:
    """What report_clinical.html.j2 shows of a task of two classes; None of others."""
    found = metrics["models"][main].get("clinical")
    if found is None or found["decisions"] is None:
        return None
    control = (metrics["models"].get(REFERENCE) or {}).get("clinical") if main != REFERENCE else None
    return {
        **found,
        "main": main,
        "positive": metrics["positive"],
        "titles": FIGURES,
        "cohort_prevalence": found["decisions"]["positives"] / found["decisions"]["n"],
        "picture": decision_curve(found["net_benefit"], control["net_benefit"] if control else None, main),
        "level": metrics["options"]["level"],
    }


def decision_curve(found: dict[str, list[float]], control: dict[str, list[float]] | None, main: str) -> str:
    """Net benefit over thresholds: of the model, of the linear control, of treating everyone and nobody."""
    figure, axes = blank_figure(4.6, 3.2)
    x = found["threshold"]
    axes.plot(x, found["model"], color=COLOURS[0], linewidth=2, label=main)
    if control is not None:
        axes.plot(x, control["model"], color=GREYS[0], linewidth=1.4, label=REFERENCE)
    axes.plot(x, found["everyone"], color=GREYS[1], linewidth=1.2, linestyle="--", label="everyone")
    axes.axhline(0, color="#3c4043", linewidth=0.9, label="nobody")
    top = max(*found["model"], *found["everyone"], 0.01)
    axes.set_ylim(-0.35 * top, 1.1 * top)
    axes.set_xlim(0, 1)
    axes.set_xlabel("threshold of the probability")
    axes.set_ylabel("net benefit per patient")
    axes.legend(fontsize=8)
    return as_svg(figure)
