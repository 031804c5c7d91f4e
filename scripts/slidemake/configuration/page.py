"""docs/configuration.md, generated from the schemas: python -m slidemake.configuration.load.page [PATH]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from slidemake.cohort import sheet_checks
from slidemake.configuration.schema import describe, leaves, resolved, schema
from slidemake.core.files import write_text

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def configuration_page() -> str:
    """The text of docs/configuration.md: a table per section of the configuration, and the sample sheet's columns."""
    root = schema()
    single = [(key, part) for key, part in root["properties"].items() if _is_leaf(part)]
    parts = ["# Configuration", root["description"], _table(single, {"sheet"})]
    for key, part in root["properties"].items():
        if _is_leaf(part):
            continue
        parts.append(f"## {key}")
        parts.append(part["description"])
        inner = resolved(part["additionalProperties"]) if isinstance(part.get("additionalProperties"), dict) else part
        needed = {f"{key}.<name>.{name}" for name in inner.get("required", ())}
        parts.append(_table(list(leaves(part, (key,))), needed))
    parts += ["## The sample sheet", _sheet_text(), _sheet_table()]
    return "\n\n".join(parts) + "\n"


def _is_leaf(part: dict[str, Any]) -> bool:
    return "properties" not in part and not isinstance(part.get("additionalProperties"), dict)


def _table(rows: list[tuple[str, dict[str, Any]]], needed: set[str]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, part in rows:
        default = "needed" if key in needed else _default(part.get("default"))
        lines.append(f"| `{key}` | {_cell(describe(part))} | {default} | {_cell(part['description'])} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    if value is None:
        return "empty"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sheet_text() -> str:
    return (
        "CSV in UTF-8, separated by commas, semicolons or tabs; a row per slide. Any other column is a label or "
        "metadata. An empty cell, `NA`, `n/a`, `NaN`, `null`, `<NA>`, `'--` and "
        "`[Not Available]` and its like are missing values."
    )


def _sheet_table() -> str:
    schema = sheet_checks.schema()
    lines = ["| column | needed | meaning |", "|---|---|---|"]
    for name, part in schema["properties"].items():
        lines.append(f"| `{name}` | {'yes' if name in schema['required'] else ''} | {_cell(part['description'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the page of all configuration keys.")
    parser.add_argument("path", nargs="?", default=PAGE, help=f"where to (default: {PAGE})")
    write_text(parser.parse_args().path, configuration_page())
