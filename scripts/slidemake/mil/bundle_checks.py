"""What a bundle that comes from others must be before anything is made with it. No torch: planning checks it, too.

The checksum finds accidents, not intent: numbers are checked for their meaning (bundle.schema.json), and
the options of stages against the configuration's own schema. That they are finite, reading them has made sure of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from slidemake.configuration.checks import phrase
from slidemake.configuration.schema import resolved, schema
from slidemake.core.failures import RunError, one_line
from slidemake.core.files import has_checksum
from slidemake.core.json_schemas import validator

SCHEMA = Path(__file__).with_name("bundle.schema.json")
STAGES = ("tissue", "stain", "tiling")  # whose options a bundle carries under the configuration's names
MOST = 8  # problems that are told


@cache
def _validator() -> Any:
    return validator(json.loads(SCHEMA.read_text()))


def check_bundle(path: str | Path, info: Mapping[str, Any]) -> None:
    """RunError that lists what is wrong with the bundle.json at `path`, whose content is `info`."""
    problems = [] if has_checksum(path) else ["it has no checksum, as all that slidemake writes"]
    problems += _against_schema(info)
    if not problems:  # what follows relies on types
        problems = [*_options(info), *_together(info)]
    if problems:
        more = f"\n  and {len(problems) - MOST} more" if len(problems) > MOST else ""
        listed = "\n  ".join(one_line(problem, 300) for problem in problems[:MOST])
        raise RunError(
            f"{path} is no bundle that can be applied:\n  {listed}{more}\nNothing was done with it. Ask for it again "
            "where it comes from, or train again."
        )


def _against_schema(info: Mapping[str, Any]) -> Iterator[str]:
    for error in _validator().iter_errors(dict(info)):
        where = ".".join(str(step) for step in error.absolute_path)
        yield f"{where}: {error.message}" if where else error.message


def _options(info: Mapping[str, Any]) -> Iterator[str]:
    """Options of the stages that the new slides will go through: the configuration's own schema is theirs."""
    parts = {key: schema()["properties"][key] for key in STAGES}
    features = resolved(schema()["properties"]["embedding"])["properties"]["features"]
    for key, part in [*parts.items(), ("features", features)]:
        if key not in info:
            continue
        for error in validator({**part, "$defs": schema().get("$defs", {})}).iter_errors(info[key]):
            for where, text in phrase(error):
                yield f"{key}.{where}: {text}".replace(".:", ":")


def _together(info: Mapping[str, Any]) -> Iterator[str]:
    """What shows only when keys are seen together: how many of each there must be, and what a threshold may be."""
    target: Mapping[str, Any] = info.get("target") or {}
    kind, classes = target.get("type", "classes"), target.get("classes") or info.get("classes") or []
    labels, threshold = target.get("labels") or [], info.get("threshold")
    if kind in ("classes", "binary", "multiclass", "ordinal") and len(classes) < 2:
        yield f"classes: {classes} are fewer than two"
    if classes and info.get("classes") and list(classes) != list(info["classes"]):
        yield "classes: they are others than those of target"
    if kind == "multilabel" and not labels:
        yield "target.labels: a multilabel bundle needs them"
    if info.get("positive") is not None and info["positive"] not in classes:
        yield f"positive: {info['positive']!r} is none of the classes"
    yield from _threshold(kind, classes, labels, threshold)
    needed: tuple[str, ...] = ("mean", "sd") if kind == "regression" else ("temperature",)
    if kind == "survival":
        needed = ("temperature", "edges") if target.get("method") == "discrete" else ("slope", "times", "hazard")
    names = [group["name"] for group in info["groups"]]
    if len(set(names)) < len(names):
        yield "groups: two have the same name"
    known = info["aggregator"].get("candidates") or {}
    for group in info["groups"]:
        yield from _parts(group, known)
        yield from (f"groups: {group['name']} has no {key}" for key in needed if key not in group)
        temperature = group.get("temperature")
        if isinstance(temperature, list) != (kind == "multilabel") and temperature is not None:
            yield f"groups: the temperature of {group['name']} is {temperature}"
        elif isinstance(temperature, list) and len(temperature) != len(labels):
            yield f"groups: {group['name']} has {len(temperature)} temperatures for {len(labels)} labels"
        wide = len(labels) if kind == "multilabel" else len(classes)
        if "intercept" in group and len(group["intercept"]) != wide:
            yield f"groups: {group['name']} has {len(group['intercept'])} intercepts for {wide} classes or labels"
        if len(group.get("times", [])) != len(group.get("hazard", [])):
            yield f"groups: {group['name']} has {len(group['times'])} times and another number of hazards"
        for key in ("times", "edges"):
            if sorted(group.get(key, [])) != group.get(key, []):
                yield f"groups: the {key} of {group['name']} do not ascend"
    domains = (info.get("harmonised") or {}).get("names", [])
    kinds = [kind["parameters"].get("domains") or 0 for kind in known.values() or [info["aggregator"]]]
    if any(len(domains) != count for count in kinds):
        yield "harmonised: its names are not as many as the domains of the aggregator"


def _parts(group: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a group name candidates of the aggregator, hold all of its members, and weigh 1 together."""
    parts = group.get("parts", [])
    if bool(parts) != bool(known):
        yield f"groups: {group['name']} has {'' if parts else 'no '}parts, and the aggregator {len(known)} candidates"
    elif parts:
        if strange := sorted({part["candidate"] for part in parts} - set(known)):
            yield f"groups: {group['name']} has parts of {', '.join(strange)}, which are no candidates"
        if sum(part["members"] for part in parts) != group["members"]:
            yield f"groups: the parts of {group['name']} do not have its {group['members']} members"
        if abs(sum(part["weight"] for part in parts) - 1) > 1e-6:
            yield f"groups: the weights of {group['name']} do not sum to 1"


def _threshold(kind: str, classes: list[str], labels: list[str], threshold: Any) -> Iterator[str]:
    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if threshold is None:
        return
    if kind == "multilabel":
        fits = isinstance(threshold, list) and len(threshold) == len(labels)
        if not fits or not all(number(t) and 0 <= t <= 1 for t in threshold):
            yield f"threshold: {threshold} is not a number from 0 to 1 for each label"
    elif kind in ("survival", "regression"):
        if not number(threshold):
            yield f"threshold: {threshold!r} is not a number"
    elif not number(threshold) or not 0 <= threshold <= 1:
        yield f"threshold: {threshold!r} is not a number from 0 to 1"
    elif len(classes) != 2:
        yield f"threshold: {threshold} is given, and there are {len(classes)} classes"
