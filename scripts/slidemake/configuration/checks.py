"""What is wrong with a configuration, in words: every problem by its full key, with what to write instead."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidemake.configuration.presets import PAPER, PUBLISHED
from slidemake.configuration.schema import describe, leaves, resolved, schema, types_of
from slidemake.core.words import nearest
from slidemake.tasks.controls import RESERVED

if TYPE_CHECKING:
    import jsonschema

FILES = (".json", ".csv")  # what names of models may not end with: metrics.json lies beside the models' folders
FOLDER_FIELDS = ("slide_id", "patient_id", "stem")  # of features.folder
FOLDERS = ("leakage", "shortcuts")  # these, too


def phrase(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
    """(full key, what is wrong with it and what to write) of one validation error."""
    where = ".".join(str(step) for step in error.absolute_path if not isinstance(step, int))
    value = json.dumps(error.instance, default=str, ensure_ascii=False)
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        for key in sorted(set(error.instance) - set(known)):
            yield f"{where}.{key}".strip("."), _unknown_key(key, known)
    elif error.validator == "required":
        known = resolved(error.schema)["properties"]
        for key in sorted(set(error.validator_value) - set(error.instance)):
            yield f"{where}.{key}".strip("."), f"is missing; write {describe(known[key])}{_extra(key)}"
    elif "propertyNames" in error.schema_path:
        yield f"{where}.{error.instance}", f"{value} becomes a folder: write {describe(error.schema)}"
    elif error.validator == "minProperties":
        yield where, "is empty; leave the key out to get the default"
    elif error.validator in ("uniqueItems", "minItems"):
        fault = "names something twice" if error.validator == "uniqueItems" else "is an empty list"
        yield where, f"{value} {fault}; write {describe(error.schema)}"
    else:
        words = [str(word) for word in error.schema.get("enum", ()) if word is not None]
        near = nearest(error.instance, words) if isinstance(error.instance, str) and words else None
        meant = f"; did you mean {near}?" if near else ""
        if isinstance(error.instance, bool) and "string" in types_of(error.schema):
            meant = "; YAML reads yes, no, on and off as true or false: write the word in quotes"
        shown = "it is empty; it must be" if error.instance is None else f"{value} is not"
        yield where, f"{shown} {describe(error.schema)}{meant}"


def _extra(key: str) -> str:
    made = "snakemake write_sheet --cores 1 --config slides_folder=DIR sheet=slides.csv"
    return f" (`{made}` makes a first one)" if key == "sheet" else ""


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """Did you mean a key beside it, or one of the same or nearly the same name elsewhere?"""
    near = nearest(key, known, 0.7)
    if near:
        return f"is not a key; did you mean {near}?"
    paths = [path for path, _ in leaves()]
    ends = {path.rsplit(".", 1)[-1] for path in paths} | set(schema()["properties"])
    end = nearest(key, ends, 0.8)
    if end:
        full = next((path for path in paths if path.rsplit(".", 1)[-1] == end), end)
        return f"is not a key here; did you mean {full}?"
    return f"is not a key; known here: {', '.join(known)}"


def sections(config: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The well-formed ones among the tasks or models: what is not is reported already."""
    found = config.get(key)
    return {name: part for name, part in found.items() if isinstance(part, dict)} if isinstance(found, dict) else {}


def _no_such(word: Any, what: str, known: Iterable[str]) -> str:
    near = nearest(str(word), known)
    return f"there is no {what} {word!r}" + (f"; did you mean {near}?" if near else f"; known: {', '.join(known)}")


def cross_check(config: dict[str, Any], encoders: list[str] | None) -> Iterator[str]:
    """Problems that show only when keys are seen together."""
    models, tasks = sections(config, "models"), sections(config, "tasks")
    for name, model in models.items():
        encoder = model.get("encoder")
        if name.lower().endswith(FILES) or name in FOLDERS:
            yield f"models.{name}: this name belongs to a file or folder of the results; choose another name"
        if name in RESERVED:
            yield f"models.{name}: this name belongs to a control that always runs; choose another name"
        if model.get("aggregator") == "mean_pool_lr" and model.get("slides") == "attention":
            yield f"models.{name}.slides: the regression mean_pool_lr has no attention over slides; write pool"
        if model.get("preset") == PAPER and model.get("aggregator") not in PUBLISHED:
            listed = ", ".join(PUBLISHED)
            yield f"models.{name}.preset: {model.get('aggregator')} has no paper to take settings from; {listed} have"
        yield from _check_invariance(name, model)
        if encoders is not None and isinstance(encoder, str) and encoder.partition(":")[0] not in encoders:
            yield f"models.{name}.encoder: {_no_such(encoder, 'encoder', encoders)}"
    for name, task in tasks.items():
        chosen = task["models"] if isinstance(task.get("models"), list) else []
        for model in chosen:
            if model in RESERVED and model not in models:
                yield f"tasks.{name}.models: {model} runs by itself as a control in every task; leave it out"
            elif isinstance(model, str) and model not in models:
                yield f"tasks.{name}.models: {_no_such(model, 'model', list(models))}"
        yield from _check_splits(name, task)
        yield from _check_task(name, task)
    if config.get("bundle_label") and not config.get("bundle"):
        yield "bundle_label: says what a bundle is to be measured by, and bundle is empty; name its folder"
    yield from _check_target(config, models, tasks)
    yield from _check_explain(config, models, tasks)
    yield from _check_features(config, models)
    yield from _check_files(config)


def _check_features(config: dict[str, Any], models: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What cannot be had of features that were made elsewhere."""
    features: dict[str, Any] = config["features"] if isinstance(config.get("features"), dict) else {}
    if not features.get("encoder"):
        if features.get("folder"):
            yield "features.encoder: is empty, and features.folder names files: write which encoder made them"
        return
    folder = features.get("folder")
    if isinstance(folder, str) and not _plain_fields(folder, FOLDER_FIELDS):
        yield f"features.folder: {folder!r} may hold {{slide_id}}, {{patient_id}} and {{stem}}, and no other braces"
    elif isinstance(folder, str) and "{" not in folder:
        yield f"features.folder: {folder} is the same for every slide; write a pattern such as {folder}/{{slide_id}}.h5"
    for section, key in (("background", "tiles"), ("stress", "tiles"), ("stain", "compare")):
        part = config.get(section)
        if isinstance(part, dict) and part.get(key):
            yield f"{section}.{key}: needs tiles of slides, and features are imported here; leave it out"
    for name, model in models.items():
        if model.get("stain") is not None:
            yield f"models.{name}.stain: nothing is normalised where features are imported; leave it out"


def _check_target(config: dict[str, Any], models: dict[str, Any], tasks: dict[str, Any]) -> Iterator[str]:
    """An external cohort is one on which nothing is fitted, the reference of the stain neither."""
    stain = config["stain"] if isinstance(config.get("stain"), dict) else {}
    used = {model.get("stain") or stain.get("method") for model in models.values()}
    if stain.get("target") != "cohort" or used <= {"none"}:
        return
    for name, task in tasks.items():
        splits = task["splits"] if isinstance(task.get("splits"), dict) else {}
        if splits.get("method") == "external":
            yield (
                f"stain.target: the median of the cohort would be taken over the external cohort of task {name}, too, "
                "on which nothing may be fitted; write tiatoolbox, or give an image of the training cohort"
            )


def _check_splits(name: str, task: dict[str, Any]) -> Iterator[str]:
    splits: dict[str, Any] = task["splits"] if isinstance(task.get("splits"), dict) else {}
    method, where = splits.get("method"), f"tasks.{name}.splits"
    if method == "file" and not splits.get("file"):
        yield f"{where}.file: method file needs it; name a split file of CLAM, Patho-Bench or STAMP"
    elif method == "file" and not Path(str(splits["file"])).exists():
        yield f"{where}.file: there is no file or folder {splits['file']}"
    if method == "external" and not splits.get("test"):
        yield f"{where}.test: method external needs it; name the values of column {splits.get('column')} to be tested"


def _check_invariance(name: str, model: dict[str, Any]) -> Iterator[str]:
    options = model["invariance"] if isinstance(model.get("invariance"), dict) else {}
    used = [key for key, value in options.items() if key != "domain" and value not in (0, False, "none")]
    if used and model.get("aggregator") == "mean_pool_lr":
        yield f"models.{name}.invariance: the regression mean_pool_lr knows no {used[0]}; leave it out"
    if options.get("v_rex") and options.get("group_dro"):
        yield f"models.{name}.invariance: group_dro and v_rex weigh the same losses; choose one"


# task's key -> types that it is for
_KEYS_OF_TYPES = {
    "positive": ("binary",),
    "classes": ("binary", "multiclass"),
    "labels": ("multilabel",),
    "order": ("ordinal",),
    "unit": ("regression", "survival"),
    "method": ("survival",),
    "bins": ("survival",),
    "horizons": ("survival",),
}


def _check_task(name: str, task: dict[str, Any]) -> Iterator[str]:
    """Keys that a task's type needs, or does not have."""
    kind, needed = task.get("type"), "labels" if task.get("type") == "multilabel" else "label"
    defaults = {key: resolved(part).get("default") for key, part in schema()["$defs"]["task"]["properties"].items()}
    if task.get(needed) is None:
        yield f"tasks.{name}.{needed}: is missing; write {describe(schema()['$defs']['task']['properties'][needed])}"
    if kind == "multilabel" and task.get("label") is not None:
        yield f"tasks.{name}.label: a multilabel task has labels (a list of columns); remove the key"
    for key, kinds in _KEYS_OF_TYPES.items():
        if kind not in kinds and isinstance(kind, str) and task.get(key) != defaults[key]:
            what = "no positive class" if key == "positive" else f"no {key}"
            yield f"tasks.{name}.{key}: a {kind} task has {what}; remove the key"
    horizons = task.get("horizons")
    if isinstance(horizons, list) and all(isinstance(h, float) for h in horizons) and sorted(set(horizons)) != horizons:
        yield f"tasks.{name}.horizons: {horizons} must be different times in ascending order"


def _check_explain(config: dict[str, Any], models: dict[str, Any], tasks: dict[str, Any]) -> Iterator[str]:
    explain: dict[str, Any] = config["explain"] if isinstance(config.get("explain"), dict) else {}
    if isinstance(explain.get("model"), str) and explain["model"] not in models:
        yield f"explain.model: {_no_such(explain['model'], 'model', list(models))}"
    for name, task in tasks.items():
        if explain.get("slides") == "positive" and task.get("type") == "binary" and task.get("positive") is None:
            yield f"tasks.{name}.positive: explain.slides is positive, so say which class that is"
    if not _plain_fields(str(explain.get("truth") or ""), ("folder", "stem", "slide_id")):
        yield f"explain.truth: {explain['truth']!r} may hold {{folder}}, {{stem}} and {{slide_id}}, and no other braces"


def _plain_fields(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether the fields of a format string are bare names, none with an attribute, an index, a format or a conversion:
    `{stem.__class__}` reaches into Python, and `{stem:>999999999}` takes the memory.
    """
    try:
        fields = list(string.Formatter().parse(pattern))
    except ValueError:
        return False
    return all(name is None or (name in names and not form and not how) for _, name, form, how in fields)


def _check_output(output: str) -> Iterator[str]:
    """A folder of its own, with a name that is no pattern and can be shown."""
    odd = sorted({c for c in output if c in "{}" or not c.isprintable()})
    if odd:
        what = "{ and } are wildcards of Snakemake" if odd[0] in "{}" else "it holds a character that is not seen"
        yield f"output: {json.dumps(output)} cannot be a folder of results: {what}; write another name"
    elif Path(output).resolve() in (Path("/"), Path.home(), Path.cwd()):
        yield f"output: {output} is no folder for results alone; write the name of one, such as results"


def _check_files(config: dict[str, Any]) -> Iterator[str]:
    """Files that settings name must be there. The sheet says so itself, with more to tell."""
    if isinstance(config.get("output"), str):
        yield from _check_output(config["output"])
    stain = config["stain"] if isinstance(config.get("stain"), dict) else {}
    target = stain.get("target")
    if isinstance(target, str) and target not in ("tiatoolbox", "cohort") and not Path(target).is_file():
        near = nearest(target, ("tiatoolbox", "cohort"))
        meant = f"; did you mean {near}?" if near else "; give an image, or write tiatoolbox or cohort"
        yield f"stain.target: there is no file {target}{meant}"
    for key, kind in (("encoders_file", "file"), ("bundle", "folder"), ("slides_folder", "folder")):
        value = config.get(key)
        if isinstance(value, str) and not (Path(value).is_file() if kind == "file" else Path(value).is_dir()):
            yield f"{key}: there is no {kind} {value}"
    tiling = config["tiling"] if isinstance(config.get("tiling"), dict) else {}
    own = [name for name, model in sections(config, "models").items() if model.get("stain") is not None]
    if own and tiling.get("pixels") == "normalised":
        yield f"models.{own[0]}.stain: tiles that are stored normalised have one stain; set tiling.pixels: scanned"
    if tiling.get("store") == "coords" and tiling.get("pixels") == "normalised":
        yield "tiling.pixels: store coords keeps no pixels to normalise; set store: pixels, or pixels: scanned"
