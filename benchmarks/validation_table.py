"""Figures of several cohorts as tables: each cohort, means with intervals, paired differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

PLAIN, ATTENTION, PLAIN_ATTENTION = "plain ABMIL", "attention", "plain ABMIL's attention"
TILES, IOU = "tiles, supervised", "mask IoU"
IOU_AT_LEAST = 0.8  # mean over cohorts; below it the mask cannot be what the run rests on


def columns(cohorts: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The figures of finished cohorts by column: AUROC of models, then of controls, then the others."""
    names = {name: None for cohort in cohorts for name in cohort["models"]}
    names.update({name: None for cohort in cohorts for name in cohort["auroc"] if name not in names})
    table: dict[str, list[float | None]] = {name: [c["auroc"].get(name) for c in cohorts] for name in names}
    for title, key in (
        (PLAIN, "plain"),
        (ATTENTION, "attention"),
        (PLAIN_ATTENTION, "plain_attention"),
        (TILES, "tiles_supervised"),
        (IOU, "mask_iou"),
    ):
        table[title] = [cohort[key] for cohort in cohorts]
    table.pop("prevalence", None)
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def mean_interval(values: Sequence[float | None], level: float = 0.95) -> tuple[float, float, float] | None:
    """(mean, low, high) over cohorts by Student's t; None without figures, an infinite interval of a single one."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    mean = float(known.mean())
    if len(known) < 2:
        return mean, -math.inf, math.inf
    reach = stats.t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
    return mean, mean - reach, mean + reach


def paired(ours: Sequence[float | None], other: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean difference ours - other over the cohorts that have both, with its interval."""
    both = [(a, b) for a, b in zip(ours, other, strict=True) if a is not None and b is not None]
    return mean_interval([a - b for a, b in both])


def in_brackets(found: tuple[float, float, float] | None, signed: bool = False) -> str:
    """`0.87 (0.81 to 0.93)`; without an interval where there is none."""
    if found is None:
        return ""
    mean, low, high = (f"{value:+.2f}" if signed else f"{value:.2f}" for value in found)
    return mean if math.isinf(found[1]) else f"{mean} ({low} to {high})"


def stain_in_words(stain: Mapping[str, Mapping[str, int]]) -> str:
    done = [f"{count} {method}" for method, count in sorted(stain["normalised"].items())]
    left = [f"{count} left ({reason})" for reason, count in sorted(stain["left"].items())]
    return ", ".join([*done, *left])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cohort_table(cohorts: Sequence[Mapping[str, Any]]) -> str:
    """A row per cohort, and the mean with its interval over cohorts below them."""
    table = columns(cohorts)
    lines = [_line(["cohort", *table, "stain", "failed"]), f"|{'---|' * (len(table) + 3)}"]
    for number, cohort in enumerate(cohorts):
        figures = ["" if values[number] is None else f"{values[number]:.2f}" for values in table.values()]
        failed = ", ".join(f"{count} {code}" for code, count in sorted(cohort["failed"].items()))
        lines.append(_line([cohort["name"], *figures, stain_in_words(cohort["stain"]), failed or "0"]))
    lines.append(_line(["**mean**", *(in_brackets(mean_interval(values)) for values in table.values()), "", ""]))
    return "\n".join(lines)


def difference_table(
    cohorts: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Paired differences of the first model from everything beside it, and from an earlier validation of the same
    cohorts (`before`: its cohorts by name)."""
    table, model = columns(cohorts), cohorts[0]["models"][0]
    lines = [_line([f"{model} minus", "AUROC"]), "|---|---|"]
    for name, values in table.items():
        if name != model and name not in (ATTENTION, PLAIN_ATTENTION, TILES, IOU):
            lines.append(_line([name, in_brackets(paired(table[model], values), signed=True)]))
    if before is not None:
        lines.append(_line(["itself before", in_brackets(_since(cohorts, before), signed=True)]))
    return "\n".join(lines)


def _since(
    cohorts: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float, float] | None:
    pairs = [(c, before[c["name"]]) for c in cohorts if c["name"] in before and before[c["name"]].get("models")]
    first = [(new["auroc"].get(new["models"][0]), old["auroc"].get(old["models"][0])) for new, old in pairs]
    return paired([a for a, _ in first], [b for _, b in first])


def verdicts(
    cohorts: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]] | None = None
) -> list[tuple[bool, str]]:
    """(passed, sentence) of every check. A check by an interval fails only where all of the interval is on the wrong
    side: few cohorts prove little, in either direction."""
    table, model = columns(cohorts), cohorts[0]["models"][0]
    checks = []

    def check(found: tuple[float, float, float] | None, what: str, failed: bool, signed: bool = False) -> None:
        if found is not None:
            checks.append((not failed, f"{what}: {in_brackets(found, signed)}"))

    behind = paired(table[model], table[PLAIN])
    check(behind, f"{model} is not behind plain ABMIL", behind is not None and behind[2] < 0, signed=True)
    if "shuffled_label" in table:
        chance = mean_interval(table["shuffled_label"])
        check(chance, "shuffled labels are at chance", chance is not None and chance[1] > 0.5)
    attention = mean_interval(table.get(ATTENTION, []))
    check(attention, f"{model} looks at the tumour", attention is not None and attention[2] < 0.5)
    iou = mean_interval(table.get(IOU, []))
    check(iou, f"tissue masks have an IoU of {IOU_AT_LEAST} or more", iou is not None and iou[0] < IOU_AT_LEAST)
    if before is not None:
        since = _since(cohorts, before)
        check(since, "no worse than before", since is not None and since[2] < 0, signed=True)
    return checks
