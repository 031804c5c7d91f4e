"""Figures of the report, as SVG text: vector, small, readable in print, without a network."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

# Colour-blind safe (Okabe and Ito 2008); models first, controls in greys.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS = ("#6b7280", "#9ca3af", "#b8bec8", "#4b5563")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "axes.grid": True,
    "grid.color": "#eceff1",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "slidemake",
}


def blank_figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=(width, height), layout="constrained")


def as_svg(figure: Any) -> str:
    """`data:` address of the figure as SVG; the same figure gives the same text."""
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue().encode()).decode()


def _colours(models: dict[str, Any]) -> dict[str, str]:
    names = [name for name, model in models.items() if not model.get("control")]
    controls = [name for name in models if name not in names]
    found = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    return found | {name: GREYS[i % len(GREYS)] for i, name in enumerate(controls)}


def forest(metrics: dict[str, Any], metric: str = "auroc", title: str = "AUROC", chance: float = 0.5) -> str:
    """Pooled figure of every model with its interval, beside what no skill gives."""
    models = metrics["models"]
    rows = [(name, m["scopes"]["pooled"]["metrics"].get(metric)) for name, m in models.items()]
    rows = [(name, value) for name, value in rows if value and value["value"] is not None]
    figure, axes = blank_figure(6.2, 0.6 + 0.36 * max(1, len(rows)))
    colours = _colours(models)
    for place, (name, value) in enumerate(reversed(rows)):
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [place, place], color=colours[name], linewidth=2.4, alpha=0.55)
        axes.plot(value["value"], place, "o", color=colours[name], markersize=6)
        label = f"{value['value']:.2f}"
        axes.annotate(label, (value["value"], place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(chance, color="#9aa0a6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    if metric == "auroc":
        axes.set_xlim(0, 1.02)
    axes.set_xlabel(f"patient-level {title} with 95 % interval (dotted: no skill)")
    axes.grid(axis="y", visible=False)
    return as_svg(figure)


def roc(curves: dict[str, Any], metrics: dict[str, Any]) -> str:
    """ROC curves of all models."""
    return _pairs(curves, metrics, "roc", ("fpr", "tpr"), ("1 - specificity", "sensitivity"), diagonal=True)


def precision_recall(curves: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Precision against recall, with the prevalence as the line of no skill."""
    return _pairs(curves, metrics, "pr", ("recall", "precision"), ("recall", "precision"), diagonal=False)


def _pairs(
    curves: dict[str, Any],
    metrics: dict[str, Any],
    kind: str,
    keys: tuple[str, str],
    labels: tuple[str, str],
    *,
    diagonal: bool,
) -> str:
    figure, axes = blank_figure(3.5, 3.3)
    colours = _colours(metrics["models"])
    for name, model in metrics["models"].items():
        points = curves["models"].get(name, {}).get(kind)
        if not points or name == "prevalence":
            continue
        control = model.get("control")
        axes.plot(
            points[keys[0]],
            points[keys[1]],
            color=colours[name],
            linewidth=1.1 if control else 2.2,
            zorder=2 if control else 3,
            label=name,
            drawstyle="default" if diagonal else "steps-post",
        )
    if diagonal:
        axes.plot([0, 1], [0, 1], ":", color="#9aa0a6", linewidth=1)
    else:
        counts = metrics["class_counts"]
        share = counts.get(metrics["positive"], 0) / max(1, sum(counts.values()))
        axes.axhline(share, linestyle=":", color="#9aa0a6", linewidth=1)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend(fontsize=7.5, loc="lower right" if diagonal else "lower left")
    return as_svg(figure)


def training(curves: list[dict[str, str]], model: str) -> str | None:
    """Training and validation loss over epochs: every fold thin, the median of the folds still training thick."""
    runs: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in curves:
        values = tuple(float(row[key]) if row.get(key) not in ("", None) else np.nan for key in _LOSSES)
        runs.setdefault((row["repeat"], row["fold"]), []).append(values)  # type: ignore[arg-type]
    if not runs:
        return None
    figure, axes = blank_figure(3.5, 3.3)
    for column, colour, label in ((1, COLOURS[0], "training"), (2, COLOURS[1], "validation")):
        longest = max(len(run) for run in runs.values())
        table = np.full((len(runs), longest), np.nan)
        for place, run in enumerate(runs.values()):
            table[place, : len(run)] = [values[column] for values in run]
            axes.plot(range(1, len(run) + 1), table[place, : len(run)], color=colour, alpha=0.16, linewidth=0.8)
        enough = np.isfinite(table).sum(0) >= max(1, len(runs) // 2)
        if enough.any():
            epochs = np.flatnonzero(enough)
            axes.plot(epochs + 1, np.nanmedian(table[:, enough], 0), color=colour, linewidth=2.2, label=label)
    axes.set_xlabel(f"epoch ({model}, {len(runs)} folds)")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8)
    return as_svg(figure)


_LOSSES = ("epoch", "train_loss", "val_loss")


def scores(patients: list[dict[str, str]], positive: str, model: str, seed: int = 0) -> str:
    """Out-of-fold probability of every patient by site, coloured by true label; the threshold's range as a band."""
    mean: dict[str, list[float]] = {}
    about: dict[str, tuple[str, str]] = {}
    for row in patients:
        mean.setdefault(row["patient_id"], []).append(float(row[f"prob_{positive}"]))
        about[row["patient_id"]] = (row.get("site") or "", row["label"])
    sites = sorted({site for site, _ in about.values()})
    figure, axes = blank_figure(max(3.5, 0.9 * len(sites) + 1.6), 3.3)
    rng = np.random.default_rng(seed)
    for label, colour in ((positive, COLOURS[1]), (None, COLOURS[0])):
        chosen = [p for p in sorted(mean) if (about[p][1] == positive) == (label is not None)]
        x = [sites.index(about[p][0]) + rng.uniform(-0.22, 0.22) for p in chosen]
        y = [float(np.mean(mean[p])) for p in chosen]
        name = positive if label else f"not {positive}"
        axes.scatter(x, y, s=26, color=colour, alpha=0.8, linewidths=0, label=name)
    cuts = [float(row["threshold"]) for row in patients if row.get("threshold")]
    if cuts:
        axes.axhspan(np.quantile(cuts, 0.25), np.quantile(cuts, 0.75), color="#9aa0a6", alpha=0.18, linewidth=0)
        axes.axhline(float(np.median(cuts)), color="#9aa0a6", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(sites)), [site or "no site" for site in sites])
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(f"out-of-fold probability of {positive}")
    axes.set_xlabel(f"{model}; dashed: median threshold of the folds")
    axes.legend(fontsize=7.5)
    return as_svg(figure)


def throughput(stages: list[dict[str, Any]]) -> str:
    """Seconds that each stage of the spine took, summed over slides."""
    figure, axes = blank_figure(6.2, 0.6 + 0.34 * max(1, len(stages)))
    names = [stage["stage"] for stage in stages][::-1]
    seconds = [stage["seconds"] for stage in stages][::-1]
    axes.barh(names, seconds, color=COLOURS[0], height=0.6)
    for place, value in enumerate(seconds):
        axes.annotate(f" {value:.0f} s", (value, place), va="center", fontsize=8)
    axes.set_xlabel("seconds, summed over slides (jobs run side by side)")
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(seconds or [1]) * 1.15 + 0.1)
    return as_svg(figure)


# -- numbers, grades, survival ---------------------------------------------------------------------------------------

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
