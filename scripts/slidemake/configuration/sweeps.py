"""Sweeps: many models from one entry of the configuration, every combination of the settings that are given as lists.

    sweeps:
      encoders:
        encoder: [efficientnet_lite0, resnet50]
        aggregator: [abmil_gated, transmil]
        stain: [none, macenko]
        invariance: [{}, {consistency: 5}]

makes 16 models named `encoders-efficientnet_lite0-abmil_gated-none-plain` and so on: ordinary models, whose slides are
read, tiled and embedded once for all of them, and whose jobs are ordinary jobs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from slidemake.core.failures import RunError

MOST = 500  # models of one sweep: beyond that somebody has mistaken it for a hyperparameter search


def expand_sweeps(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` (a configuration as the user wrote it) with the models of its `sweeps` among its `models`.

    A task that names a sweep gets its models. What is no sweep at all is left for the schema to report. Raises RunError
    for too many models and for names that are taken.
    """
    sweeps = raw.get("sweeps")
    if not isinstance(sweeps, Mapping) or not all(isinstance(sweep, Mapping) for sweep in sweeps.values()):
        return dict(raw)
    models = dict(raw.get("models") or {})
    members: dict[str, list[str]] = {}
    for name, sweep in sweeps.items():
        found = dict(sweep_models(str(name), sweep))
        taken = sorted((set(found) | {str(name)}) & set(models))
        if taken:
            raise RunError(f"sweeps.{name}: there is a model {taken[0]} already; give the sweep another name.")
        models |= found
        members[str(name)] = list(found)
    tasks = {}
    for task, about in (raw.get("tasks") or {}).items():
        if isinstance(about, Mapping) and isinstance(about.get("models"), (list, str)):
            chosen = about["models"] if isinstance(about["models"], list) else [about["models"]]
            about = {**about, "models": [m for name in chosen for m in members.get(str(name), [name])]}
        tasks[task] = about
    return {**raw, "models": models, **({"tasks": tasks} if tasks else {})}


def axes(sweep: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings of a sweep that are given as lists: {key: values}."""
    return {key: list(values) for key, values in sweep.items() if isinstance(values, list)}


def sweep_models(name: str, sweep: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every model of a sweep, the last list running fastest."""
    varied = axes(sweep)
    count = 1
    for values in varied.values():
        count *= len(values)
    if count > MOST:
        raise RunError(f"sweeps.{name} makes {count} models; a sweep has at most {MOST}. Shorten its lists.")
    seen: dict[str, tuple[Any, ...]] = {}
    for combination in itertools.product(*varied.values()):
        model = "-".join([name, *(word(value) for value in combination)])
        if model in seen:
            raise RunError(f"sweeps.{name}: two combinations would be called {model}; is a value listed twice?")
        seen[model] = combination
        yield model, {**sweep, **dict(zip(varied, combination, strict=True))}


def word(value: Any) -> str:
    """A value as a part of a model's name: `0.25`, `virchow2_cls`, `consistency5`; nothing at all is `plain`."""
    if value is None or value == {} or value == "":
        return "plain"
    if isinstance(value, Mapping):
        return "_".join(f"{key}{'' if item is True else word(item)}" for key, item in value.items())
    return re.sub(r"[^A-Za-z0-9_.]+", "_", str(value))


def axis_table(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """{model: {axis: value in words}} of the models of all sweeps."""
    table = {}
    for name, sweep in sweeps.items():
        for model, settings in sweep_models(str(name), sweep):
            table[model] = {axis: word(settings[axis]) for axis in axes(sweep)}
    return table


def in_sweeps(problems: list[str], sweeps: Any) -> list[str]:
    """Problems of models that a sweep made, told of the sweep: its user wrote no such models."""
    if not isinstance(sweeps, Mapping) or not all(isinstance(sweep, Mapping) for sweep in sweeps.values()):
        return problems
    made = {f"models.{model}.": f"sweeps.{name}." for name in sweeps for model, _ in sweep_models(name, sweeps[name])}
    told = []
    for problem in problems:
        prefix = next((prefix for prefix in made if problem.startswith(prefix)), None)
        told.append(problem.replace(prefix, made[prefix], 1) if prefix else problem)
    return told
