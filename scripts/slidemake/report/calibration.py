"""The report's part on predicted probabilities: calibration of classes, grades, labels and survival, and abstention."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidemake.report.figures import COLOURS, as_svg, blank_figure

BARS = 0.16  # height of the counts below a reliability diagram, as a share of the axis
LABELS_SHOWN = 12
DIAGRAMS = 3  # horizons of which a diagram is drawn: first, middle, last
CALIBRATION = {
    "ece": "ECE, equal mass",
    "ece_width": "ECE, equal width",
    "ece_classwise": "ECE, by class",
    "brier": "Brier",
    "slope": "slope (1)",
    "intercept": "intercept (0)",
}


def probabilities_section(entry: dict[str, Any]) -> dict[str, Any]:
    """What is shown of the probabilities of classes, of grades, or of every label: calibration, sets, abstention."""
    found = entry.get("labels") or {"": entry}
    shown = dict(list(found.items())[:LABELS_SHOWN])
    return {
        "parts": [_part(name, part) for name, part in shown.items()],
        "labels_left_out": len(found) - len(shown),
    }


def _part(label: str, entry: dict[str, Any]) -> dict[str, Any]:
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
        "label": label,
        "titles": {key: title for key, title in CALIBRATION.items() if key in calibration},
        "calibration": calibration,
        "bins": [("before", calibration["before"]), ("after" if calibration["before"] else "", calibration)],
        "sets": entry["conformal"],
        "pictures": pictures,
    }


def survival_section(calibration: dict[str, Any], unit: str) -> dict[str, Any]:
    """What is shown of predicted survival: diagrams of three horizons, a line for every horizon and for every site."""
    names = list(calibration["horizons"])
    drawn = sorted({0, len(names) // 2, len(names) - 1})[:DIAGRAMS]
    at = {name: f"{float(name):g} {unit}".strip() for name in names}
    pictures = [
        (f"Reliability at {at[names[i]]}", reliability_of_survival(calibration["horizons"][names[i]])) for i in drawn
    ]
    middle = calibration["middle"]
    sites = [
        (site, found["reason"] or None, found["horizons"] and found["horizons"][middle], found["n"])
        for site, found in calibration["sites"].items()
    ]
    return {
        "of": calibration["of"],
        "pictures": pictures,
        "horizons": [(at[name], found) for name, found in calibration["horizons"].items()],
        "middle": at[middle],
        "sites": sites,
    }


def reliability(calibration: dict[str, Any], table: str) -> str:
    """Observed against predicted, before (grey) and after (blue), with the patients of each bin as bars below."""
    figure, axes = _square()
    before, key = calibration["before"], "ece" if table == "table" else "ece_width"
    if before:
        _points(axes, before[table], "#8a9099", f"before: ECE {before[key]:.2f}")
    _points(axes, calibration[table], COLOURS[0], f"{'after: ' if before else ''}ECE {calibration[key]:.2f}")
    if table == "table_width":  # bins of equal mass hold equal numbers
        _counts(axes, calibration[table])
    _finish(axes)
    return as_svg(figure)


def reliability_by_site(calibration: dict[str, Any]) -> str:
    """Observed against predicted at each site, after scaling, with the number of patients in the legend."""
    figure, axes = _square()
    measured = {site: found["after"] for site, found in calibration["sites"].items() if found["after"]}
    for i, (site, found) in enumerate(measured.items()):
        _points(axes, found["table"], COLOURS[i % len(COLOURS)], f"{site} (n {found['n']})")
    _finish(axes)
    return as_svg(figure)


def reliability_of_survival(found: dict[str, Any]) -> str:
    """Events by the horizon as Kaplan-Meier has them in groups of predicted risk, against the prediction."""
    figure, axes = _square()
    known = [row for row in found["table"] if row["observed"] is not None]
    label = f"{found['events']} events in {found['n']}"
    if known:
        _points(axes, known, COLOURS[0], f"{label}, ECE {found['ece']:.2f}")
    else:
        axes.plot([], [], label=f"{label}; {found['reason']}")
    _finish(axes, "predicted probability of the event", "observed (Kaplan-Meier)")
    return as_svg(figure)


def abstention(found: dict[str, Any]) -> str:
    """Error rate against the share of patients on whom the model decides."""
    figure, axes = blank_figure(3.6, 3.6)
    axes.plot(found["share"], found["risk"], color=COLOURS[0], linewidth=2, label=f"model, area {found['aurc']:.3f}")
    axes.axhline(found["full"], color="#9aa0a6", linestyle=":", linewidth=1, label=f"all decided: {found['full']:.2f}")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(0.1, 1.1 * max(found["risk"])))
    axes.set_xlabel("share of patients decided, surest first")
    axes.set_ylabel("share of them decided wrongly")
    axes.figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)
    return as_svg(figure)


def _square() -> tuple[Any, Any]:
    figure, axes = blank_figure(3.6, 3.6)
    axes.plot([0, 1], [0, 1], ":", color="#9aa0a6", linewidth=1)
    return figure, axes


def _points(axes: Any, table: list[dict[str, Any]], colour: str, label: str) -> None:
    for row in table:
        axes.plot([row["predicted"]] * 2, [row["low"], row["high"]], color=colour, alpha=0.3, linewidth=1.6)
    points = np.array([[row["predicted"], row["observed"]] for row in table])
    axes.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=4.5, linewidth=1, label=label)


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


def _finish(axes: Any, x: str = "predicted probability", y: str = "observed frequency") -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)
