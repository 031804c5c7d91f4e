"""The report's part on folds, comparisons, calibration, abstention and subgroups of a task."""

from __future__ import annotations

from typing import Any

from slidemake.report_figures import COLOURS, _figure, _svg
from slidemake.verdict import SHUFFLED

BARS = 0.16  # height of the counts below a reliability diagram, as a share of the axis
FOLDS_SHOWN = 30
CALIBRATION = {
    "ece": "ECE, equal mass",
    "ece_width": "ECE, equal width",
    "brier": "Brier",
    "slope": "slope (1)",
    "intercept": "intercept (0)",
}


def evaluation_section(metrics: dict[str, Any], splits: dict[str, Any], main: str) -> dict[str, Any]:
    """What report_evaluation.html.j2 shows of a task; `metrics` is metrics.json, `splits` splits.json."""
    section = comparable_section(metrics, splits, main, "auroc", "AUROC")
    return {**section, **probabilities_section(metrics["models"][main]), "delong": True, "prevalence": True}


def probabilities_section(entry: dict[str, Any]) -> dict[str, Any]:
    """What is shown of the probabilities of classes, or of grades: calibration, conformal sets, abstention."""
    calibration = entry["calibration"]
    most = max(row["count"] for row in calibration["table"])
    pictures = [
        (f"Reliability, bins of equal mass (up to {most} patients each)", reliability(calibration, "table")),
        ("Reliability, bins of equal width (bars: patients)", reliability(calibration, "table_width")),
    ]
    if any(site["after"] for site in calibration["sites"].values()):
        pictures.append(("Reliability by site", reliability_by_site(calibration)))
    if entry["abstention"]["share"]:
        pictures.append(("Errors among the patients that the model is surest of", abstention(entry["abstention"])))
    return {
        "titles": CALIBRATION,
        "calibration": calibration,
        "bins": [("before", calibration["before"]), ("after" if calibration["before"] else "", calibration)],
        "sets": entry["conformal"],
        "abstention": entry["abstention"],
        "pictures": pictures,
    }


def comparable_section(
    metrics: dict[str, Any], splits: dict[str, Any], main: str, metric: str, title: str
) -> dict[str, Any]:
    """What tasks of all types show: folds, comparisons of models by `metric` (called `title`), subgroups; nothing of
    what is of probabilities."""
    rows = splits.get("table", [])
    first = [row for row in rows if row["repeat"] == rows[0]["repeat"]] if rows else []
    return {
        "main": main,
        "calibration": None,
        "sets": None,
        "delong": False,
        "prevalence": False,
        "pictures": [],
        "metric": metric,
        "title": title,
        "folds": first[:FOLDS_SHOWN],
        "folds_left_out": max(0, len(first) - FOLDS_SHOWN),
        "method": splits.get("method", ""),
        "about": splits.get("about", {}),
        # shuffled labels are another cohort: nothing to compare, and nothing to say
        "comparisons": [
            c
            for c in metrics["comparisons"]
            if (c["p_holm"] is not None or c["reason"]) and SHUFFLED not in (c["model"], c["reference"])
        ],
        "subgroups": metrics["models"][main]["subgroups"],
        "intervals": metrics["models"][main].get("intervals"),
    }


def reliability(calibration: dict[str, Any], table: str) -> str:
    """Observed against predicted, before (grey) and after (blue), with the patients of each bin as bars below."""
    figure, axes = _figure(3.6, 3.6)
    axes.plot([0, 1], [0, 1], ":", color="#9aa0a6", linewidth=1)
    before, key = calibration["before"], "ece" if table == "table" else "ece_width"
    if before:
        _points(axes, before[table], "#8a9099", f"before: ECE {before[key]:.2f}")
    _points(axes, calibration[table], COLOURS[0], f"{'after: ' if before else ''}ECE {calibration[key]:.2f}")
    if table == "table_width":  # bins of equal mass hold equal numbers
        _counts(axes, calibration[table])
    _finish(axes)
    return _svg(figure)


def reliability_by_site(calibration: dict[str, Any]) -> str:
    """Observed against predicted at each site, after scaling, with the number of patients in the legend."""
    figure, axes = _figure(3.6, 3.6)
    axes.plot([0, 1], [0, 1], ":", color="#9aa0a6", linewidth=1)
    measured = {site: found["after"] for site, found in calibration["sites"].items() if found["after"]}
    for i, (site, found) in enumerate(measured.items()):
        _points(axes, found["table"], COLOURS[i % len(COLOURS)], f"{site} (n {found['n']})")
    _finish(axes)
    return _svg(figure)


def _points(axes: Any, table: list[dict[str, Any]], colour: str, label: str) -> None:
    for row in table:
        axes.plot([row["predicted"]] * 2, [row["low"], row["high"]], color=colour, alpha=0.3, linewidth=1.6)
    axes.plot(
        [r["predicted"] for r in table],
        [r["observed"] for r in table],
        "o-",
        color=colour,
        markersize=4.5,
        linewidth=1,
        label=label,
    )


def _counts(axes: Any, table: list[dict[str, Any]]) -> None:
    """Patients in each bin, as bars from below; the figures stand on them."""
    most = max(row["count"] for row in table)
    for row in table:
        width = max(0.012, row["to"] - row["from"])
        height = BARS * row["count"] / most
        axes.bar((row["from"] + row["to"]) / 2, height, width * 0.9, color="#d6dade", zorder=0)
        axes.annotate(
            str(row["count"]),
            ((row["from"] + row["to"]) / 2, height),
            (0, 1),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            color="#5f6368",
        )


def _finish(axes: Any) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed frequency")
    axes.figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)


def abstention(found: dict[str, Any]) -> str:
    """Error rate against the share of patients on whom the model decides."""
    figure, axes = _figure(3.6, 3.6)
    axes.plot(found["share"], found["risk"], color=COLOURS[0], linewidth=2, label=f"model, area {found['aurc']:.3f}")
    axes.axhline(found["full"], color="#9aa0a6", linestyle=":", linewidth=1, label=f"all decided: {found['full']:.2f}")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(0.1, 1.1 * max(found["risk"])))
    axes.set_xlabel("share of patients decided, surest first")
    axes.set_ylabel("share of them decided wrongly")
    axes.figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)
    return _svg(figure)
