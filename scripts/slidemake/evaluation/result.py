"""What metrics.json says of a model, and how it is said."""

from __future__ import annotations

from typing import Any

from slidemake.tasks.controls import SHUFFLED


def interval(m: dict[str, Any], value: str = "value") -> str:
    if m["low"] is None:
        return f"{m[value]:.2f}"
    return f"{m[value]:.2f} ({m['low']:.2f} to {m['high']:.2f})"


def say(level: str, code: str, text: str) -> dict[str, str]:
    return {"level": level, "code": code, "text": text}


def rivals_of(name: str, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """{control: comparison in a metric} of a model with the controls that could have worked."""
    return {
        c["reference"]: {**c["metrics"][metric], "p_holm": c.get("p_holm")}
        for c in result["comparisons"]
        if c["model"] == name
        and c["reference"] != SHUFFLED
        and result["models"][c["reference"]]["control"]  # not another model of the task
        and (c["metrics"] or {}).get(metric, {}).get("low") is not None
    }


def pooled(result: dict[str, Any], name: str, metric: str) -> dict[str, Any] | None:
    """The figure of a model over all patients; None where it was not trained or has no such metric."""
    entry = result["models"].get(name)
    return entry["scopes"]["pooled"]["metrics"].get(metric) if entry else None
