"""The schema of the configuration: read by people (`describe`, `leaves`), and values filled and converted by it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("config.schema.json")
_INTEGER = re.compile(r"[+-]?\d+")
_TRUE, _FALSE = ("true", "yes"), ("false", "no")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the configuration."""
    return json.loads(SCHEMA.read_text())


# -- the schema read by people ------------------------------------------------------------------------------------


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema with its `$ref` (into `$defs`) followed."""
    while "$ref" in part:
        part = schema()["$defs"][part["$ref"].removeprefix("#/$defs/")]
    return part


def describe(part: dict[str, Any]) -> str:
    """What a value must be, in words: `a whole number from 1 to 100`, `auto or a whole number of at least 1`."""
    part = resolved(part)
    types = types_of(part)
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


def types_of(part: dict[str, Any]) -> tuple[str, ...]:
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


def filled(value: Any, part: dict[str, Any]) -> Any:
    """`value` converted to what `part` of the schema asks for, with defaults for all that is absent."""
    part = resolved(part)
    if not isinstance(value, dict) or "object" not in types_of(part):
        return _converted(value, part)
    value = {str(key): item for key, item in value.items()}
    for key, child in part.get("properties", {}).items():
        child = resolved(child)
        item = value.get(key)
        if item is None and "default" in child and not ("null" in types_of(child) and key in value):
            item = "none" if key in value and "none" in child.get("enum", ()) else copy.deepcopy(child["default"])
        if item is not None or "default" in child:
            value[key] = filled(item, child)
    other = part.get("additionalProperties")
    if isinstance(other, dict):
        value = {key: filled({} if item is None else item, other) for key, item in value.items()}
    return value


def _converted(value: Any, part: dict[str, Any]) -> Any:
    """A leaf as the type that the schema asks for where that is beyond doubt; otherwise as it is, to be reported."""
    options = [resolved(option) for option in part.get("anyOf", [part])]
    types = {kind for option in options for kind in types_of(option)}
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
