"""The user's configuration: checked against config/schemas/config.schema.json, filled with its defaults, in one go.

The schema is the only place where a key, its type, its default and its meaning are written; errors are phrased from
it (`describe`), and so is docs/configuration.md (`configuration_page`). `stage_options` names the part of the
configuration that a stage depends on, which is all that enters the stage's params and fingerprints.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidemake.failures import RunError
from slidemake.json_schemas import validator as json_validator
from slidemake.sweeps import expand_sweeps, in_sweeps
from slidemake.targets import label_columns, label_task

if TYPE_CHECKING:
    import jsonschema

SCHEMA = Path(__file__).resolve().parents[2] / "config" / "schemas" / "config.schema.json"
CONTROLS = (  # names that models may not take
    "mean_pool_lr",
    "site_only",
    "shuffled_label",
    "prevalence",
    "mean",
    "kaplan_meier",
    "best_by_validation",
)

EVALUATED = (
    "bootstrap",
    "seed",
    "ece_bins",
    "level",
    "stratify",
    "specificity",
    "abstention_alpha",
    "subgroups",
    "subgroup_patients",
    "subgroup_class",
)

# stage -> the part of the configuration that its results depend on: a section, or some of its keys.
STAGES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "screen": ("screening", ("default_mpp", "reader")),
    "tissue": ("tissue", None),
    "stain": ("stain", None),
    "tiles": ("tiling", None),
    "embed": ("embedding", None),
    "train": ("models", None),
    "evaluate": ("evaluation", EVALUATED),
    "background": ("background", None),
    "stress": ("stress", None),
    "explain": ("explain", ("slides", "truth", "top_tiles")),
    "report": ("report", None),
}
_INTEGER = re.compile(r"[+-]?\d+")
_TRUE, _FALSE = ("true", "yes"), ("false", "no")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the configuration."""
    return json.loads(SCHEMA.read_text())


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
    config = _filled(expand_sweeps(copy.deepcopy(dict(raw))), root)
    validator = json_validator(root)
    problems: dict[str, list[str]] = {}
    for error in validator.iter_errors(config):
        for where, text in _phrase(error):
            problems.setdefault(where, []).append(text)
    found = [f"{where}: {texts[0]}" if where else texts[0] for where, texts in problems.items()]
    _locate(config, Path(base))
    _resolve_models(config)
    found += _cross_check(config, None if encoders is None else sorted(encoders))
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
    """The settings that the results of `stage` (a key of STAGES) depend on, as a new dict with sorted keys.

    `stain` holds the target, which only the rules that apply the stain need; `train` is all models by name.
    """
    section, keys = STAGES[stage]
    return in_order({key: value for key, value in config[section].items() if keys is None or key in keys})


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


def split_column(splits: Mapping[str, Any]) -> str | None:
    """The column of the sheet that a split method reads, with a value for every patient; None when there is none."""
    return {
        "given": splits.get("column", "split"),
        "external": splits.get("column", "split"),
        "temporal": splits.get("date_column", "scan_date"),
        "leave_one_site_out": "site",
        "site_preserved": "site",
    }.get(splits.get("method", "kfold"))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` was probably meant to be, whatever its case."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


# -- the schema read by people ------------------------------------------------------------------------------------


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema with its `$ref` (into `$defs`) followed."""
    while "$ref" in part:
        part = schema()["$defs"][part["$ref"].removeprefix("#/$defs/")]
    return part


def describe(part: dict[str, Any]) -> str:
    """What a value must be, in words: `a whole number from 1 to 100`, `auto or a whole number of at least 1`."""
    part = resolved(part)
    types = _types(part)
    if "anyOf" in part:
        return _either([describe(option) for option in part["anyOf"]])
    if "const" in part:
        return str(part["const"])
    if "enum" in part:
        words = _either([str(value) for value in part["enum"] if value is not None])
        return f"{words}, or empty" if None in part["enum"] else words
    if "title" in part:
        text = part["title"]
    elif "array" in types:
        inner = resolved(part.get("items", {}))
        text = "a list of " + (", ".join(map(str, inner["enum"])) if "enum" in inner else "names")
    elif "object" in types:
        text = "a section with keys of its own"
    else:
        whole = f"a multiple of {part['multipleOf']}" if "multipleOf" in part else "a whole number"
        names = {"integer": whole, "number": "a number", "boolean": "true or false", "string": "text"}
        text = _either([names[kind] for kind in types if kind in names]) + _range(part)
    return f"{text}, or empty" if "null" in types else text


def _types(part: dict[str, Any]) -> tuple[str, ...]:
    kinds = part.get("type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(part: dict[str, Any]) -> str:
    low, above, high = part.get("minimum"), part.get("exclusiveMinimum"), part.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    bounds = [f" above {above}" if above is not None else "", f" of at least {low}" if low is not None else ""]
    return "".join(bounds) + (f" up to {high}" if high is not None else "")


def leaves(part: dict[str, Any] | None = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(full key, schema part) of every setting; the name of a task or model stands as `<name>`."""
    part = resolved(schema() if part is None else part)
    children = dict(part.get("properties", {}))
    if isinstance(part.get("additionalProperties"), dict):
        children["<name>"] = part["additionalProperties"]
    if not children:
        yield ".".join(path), part
    for name, child in children.items():
        yield from leaves(child, (*path, name))


# -- filling and converting ----------------------------------------------------------------------------------------


def _filled(value: Any, part: dict[str, Any]) -> Any:
    """`value` converted to what `part` of the schema asks for, with defaults for all that is absent."""
    part = resolved(part)
    if not isinstance(value, dict) or "object" not in _types(part):
        return _converted(value, part)
    value = {str(key): item for key, item in value.items()}
    for key, child in part.get("properties", {}).items():
        child = resolved(child)
        item = value.get(key)
        if item is None and "default" in child and not ("null" in _types(child) and key in value):
            item = "none" if key in value and "none" in child.get("enum", ()) else copy.deepcopy(child["default"])
        if item is not None or "default" in child:
            value[key] = _filled(item, child)
    other = part.get("additionalProperties")
    if isinstance(other, dict):
        value = {key: _filled({} if item is None else item, other) for key, item in value.items()}
    return value


def _converted(value: Any, part: dict[str, Any]) -> Any:
    """A leaf as the type that the schema asks for where that is beyond doubt; otherwise as it is, to be reported."""
    options = [resolved(option) for option in part.get("anyOf", [part])]
    types = {kind for option in options for kind in _types(option)}
    words = [word for option in options for word in option.get("enum", [option.get("const")]) if word is not None]
    if "array" in types and value is not None:
        return [_converted(item, part.get("items", {})) for item in (value if isinstance(value, list) else [value])]
    if value in words or isinstance(value, (bool, dict, list)) or value is None:
        return value
    text = str(value).strip()
    same = [word for word in words if str(word).lower() == text.lower()]
    if same:
        return same[0]
    if "string" in types:
        return text
    if "null" in types and text.lower() in ("", "null", "none"):
        return None
    if "boolean" in types and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    return _number(value, text, types)


def _number(value: Any, text: str, types: set[str]) -> Any:
    if not types & {"integer", "number"}:
        return value
    try:
        number = float(text)
    except ValueError:
        return value
    if not math.isfinite(number):
        return text  # JSON has no such number, and a schema's range does not refuse NaN
    if "number" in types:
        return number
    whole = _INTEGER.fullmatch(text) or (number.is_integer() and abs(number) < 2**53)
    return (int(text) if _INTEGER.fullmatch(text) else int(number)) if whole else value


def _locate(config: dict[str, Any], base: Path) -> None:
    """Paths that exist only below the workflow's folder point there."""
    stain: dict[str, Any] = config["stain"] if isinstance(config.get("stain"), dict) else {}
    for section, key in ((config, "sheet"), (config, "bundle"), (config, "encoders_file"), (stain, "target")):
        value = section.get(key)
        if isinstance(value, str) and value and not Path(value).exists() and (base / value).exists():
            section[key] = str(base / value)
    for task in _sections(config, "tasks").values():
        splits = task["splits"] if isinstance(task.get("splits"), dict) else {}
        value = splits.get("file")
        if isinstance(value, str) and value and not Path(value).exists() and (base / value).exists():
            splits["file"] = str(base / value)


def _resolve_models(config: dict[str, Any]) -> None:
    """A task that names no models gets all of them."""
    for task in _sections(config, "tasks").values():
        if task.get("models") is None:
            task["models"] = list(_sections(config, "models"))


# -- problems ----------------------------------------------------------------------------------------------------


def _phrase(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
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
        if isinstance(error.instance, bool) and "string" in _types(error.schema):
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


def _sections(config: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """The well-formed ones among the tasks or models: what is not is reported already."""
    found = config.get(key)
    return {name: part for name, part in found.items() if isinstance(part, dict)} if isinstance(found, dict) else {}


def _no_such(word: Any, what: str, known: Iterable[str]) -> str:
    near = nearest(str(word), known)
    return f"there is no {what} {word!r}" + (f"; did you mean {near}?" if near else f"; known: {', '.join(known)}")


def _cross_check(config: dict[str, Any], encoders: list[str] | None) -> Iterator[str]:
    """Problems that show only when keys are seen together."""
    models, tasks = _sections(config, "models"), _sections(config, "tasks")
    for name, model in models.items():
        encoder = model.get("encoder")
        if name in CONTROLS:
            yield f"models.{name}: this name belongs to a control that always runs; choose another name"
        if model.get("aggregator") == "mean_pool_lr" and model.get("slides") == "attention":
            yield f"models.{name}.slides: the regression mean_pool_lr has no attention over slides; write pool"
        yield from _check_invariance(name, model)
        if encoders is not None and isinstance(encoder, str) and encoder.partition(":")[0] not in encoders:
            yield f"models.{name}.encoder: {_no_such(encoder, 'encoder', encoders)}"
    for name, task in tasks.items():
        chosen = task["models"] if isinstance(task.get("models"), list) else []
        for model in chosen:
            if model in CONTROLS and model not in models:
                yield f"tasks.{name}.models: {model} runs by itself as a control in every task; leave it out"
            elif isinstance(model, str) and model not in models:
                yield f"tasks.{name}.models: {_no_such(model, 'model', list(models))}"
        yield from _check_splits(name, task)
        yield from _check_task(name, task)
    if config.get("bundle_label") and not config.get("bundle"):
        yield "bundle_label: says what a bundle is to be measured by, and bundle is empty; name its folder"
    yield from _check_explain(config, models, tasks)
    yield from _check_files(config)


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
    try:
        str(explain.get("truth")).format(folder="", stem="", slide_id="")
    except (KeyError, IndexError, ValueError):
        yield f"explain.truth: {explain['truth']!r} may hold {{folder}}, {{stem}} and {{slide_id}}, and no other braces"


def _check_files(config: dict[str, Any]) -> Iterator[str]:
    """Files that settings name must be there. The sheet says so itself, with more to tell."""
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
    own = [name for name, model in _sections(config, "models").items() if model.get("stain") is not None]
    if own and tiling.get("pixels") == "normalised":
        yield f"models.{own[0]}.stain: tiles that are stored normalised have one stain; set tiling.pixels: scanned"
    if tiling.get("store") == "coords" and tiling.get("pixels") == "normalised":
        yield "tiling.pixels: store coords keeps no pixels to normalise; set store: pixels, or pixels: scanned"
