"""The user's configuration: checked against config.schema.json, filled with its defaults, in one go.

The schema is the only place where a key, its type, its default and its meaning are written; errors are phrased from
it (`describe`), and so is docs/configuration.md (`page`). `stage_options` names the part of the
configuration that a stage depends on, which is all that enters the stage's params and fingerprints.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slidemake.configuration.checks import cross_check, phrase, sections
from slidemake.configuration.presets import with_presets
from slidemake.configuration.schema import filled, schema
from slidemake.configuration.sweeps import expand_sweeps, in_sweeps
from slidemake.core.failures import RunError
from slidemake.core.json_schemas import validator as json_validator
from slidemake.core.stages import STAGES
from slidemake.splits.methods import split_column
from slidemake.tasks.labels import label_columns, label_task


def load_configuration(
    raw: dict[str, Any], base: str | Path = ".", encoders: Iterable[str] | None = None
) -> dict[str, Any]:
    """Validated configuration with every default filled in; `raw` (Snakemake's config) is left as it is.

    Relative paths start at the working directory; one that is not there but below `base` (the workflow's folder)
    becomes the one below `base`. Numbers and yes/no that arrive as text (`--config`, or YAML's `2e-4`) are
    converted, a key with nothing behind it takes its default, and a task without `models` gets all of them. With
    `encoders` (keys of the registry) the models' encoders are checked too.

    Raises RunError that lists every problem with its full key and what to write instead.
    """
    root = schema()
    config = filled(with_presets(expand_sweeps(copy.deepcopy(dict(raw)))), root)
    for section, key in path_keys(config):
        section[key] = os.path.expanduser(section[key])
    validator = json_validator(root)
    problems: dict[str, list[str]] = {}
    for error in validator.iter_errors(config):
        for where, text in phrase(error):
            problems.setdefault(where, []).append(text)
    found = [f"{where}: {texts[0]}" if where else texts[0] for where, texts in problems.items()]
    _locate(config, Path(base))
    _resolve_models(config)
    found += cross_check(config, None if encoders is None else sorted(encoders))
    found = sorted(set(in_sweeps(found, raw.get("sweeps"))))
    if found:
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        listed = "\n  ".join(found)
        raise RunError(f"The configuration has {count}:\n  {listed}\nEvery key is explained in docs/configuration.md.")
    return config


def in_order(value: Any) -> Any:
    """A copy with the keys of all dicts sorted. Snakemake compares params as text: without this, the order in which
    settings are written, or a default that is written out, would run jobs again."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def stage_options(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """The settings that the results of `stage` (a key of `core.stages`) depend on, as a new dict with sorted keys.

    `stain` holds the target, which only the rules that apply the stain need; `train` is all models by name.
    """
    asked = STAGES[stage]
    if asked.section is None:
        raise KeyError(f"stage {stage} depends on no section of the configuration")
    settings = config[asked.section].items()
    return in_order({key: value for key, value in settings if asked.keys is None or key in asked.keys})


def sheet_columns(config: dict[str, Any], bundle: Mapping[str, Any] | None = None) -> list[str]:
    """Columns that the tasks need in the sheet: their labels, and those that their folds are made of; with a bundle
    (its bundle.json) those that say what it should predict.
    """
    tasks = config["tasks"].values()
    splits = [column for task in tasks if (column := split_column(task["splits"])) not in (None, "site")]
    groups = set(config["evaluation"]["subgroups"] or ()) if tasks or config["bundle_label"] else set()
    if config["bundle"] and config["bundle_label"]:
        groups |= set(label_columns(label_task(bundle or {}, config["bundle_label"])))
    labels = {column for task in tasks for column in label_columns(task)}
    return sorted(labels | {str(column) for column in splits} | groups)


def path_keys(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, key) of every setting that is a path and is set: in them, `~` is the home folder."""
    parts = ("stain", "explain", "features")
    stain, explain, features = (config[key] if isinstance(config.get(key), dict) else {} for key in parts)
    names = ("sheet", "output", "bundle", "slides_folder", "encoders_file")
    splits = [task["splits"] for task in sections(config, "tasks").values() if isinstance(task.get("splits"), dict)]
    places = [
        *((config, name) for name in names),
        (stain, "target"),
        (explain, "truth"),
        (features, "folder"),
        *((s, "file") for s in splits),
    ]
    for section, key in places:
        if isinstance(section.get(key), str):
            yield section, key


def _locate(config: dict[str, Any], base: Path) -> None:
    """Paths that exist only below the workflow's folder point there."""
    stain: dict[str, Any] = config["stain"] if isinstance(config.get("stain"), dict) else {}
    for section, key in ((config, "sheet"), (config, "bundle"), (config, "encoders_file"), (stain, "target")):
        value = section.get(key)
        if isinstance(value, str) and value and not Path(value).exists() and (base / value).exists():
            section[key] = str(base / value)
    for task in sections(config, "tasks").values():
        splits = task["splits"] if isinstance(task.get("splits"), dict) else {}
        value = splits.get("file")
        if isinstance(value, str) and value and not Path(value).exists() and (base / value).exists():
            splits["file"] = str(base / value)


def _resolve_models(config: dict[str, Any]) -> None:
    """A task that names no models gets all of them."""
    for task in sections(config, "tasks").values():
        if task.get("models") is None:
            task["models"] = list(sections(config, "models"))
