"""The table of a cohort: one row a slide with what the sheet says, what became of it, and the figures of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slidemake.core.addresses import is_remote, shown
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import read_json_if_whole

FIGURES = ("identity", "vendor", "reader", "width", "height", "mpp", "mpp_source", "objective")
FAILURE_COLUMNS = ("slide_id", "stage", "code", "message", "hint")


def cohort_rows(
    sheet: list[dict[str, str]],
    manifests: dict[str, list[dict[str, Any]]],
    results: Path,
    duplicates_of: dict[str, str],
    columns_of_stain: Callable[[str], Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of slides.csv in sheet order.

    `manifests` maps a stage (or "tiles 224px_0.5mpp") to its records, in the order of the spine: the first failure
    met is the slide's. `duplicates_of` maps a slide to the earlier slide with the same content.
    `columns_of_stain` gives of a slide by name the columns that say how its stain was judged and what is done.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, records in manifests.items():
        for record in records:
            found.setdefault(record["slide_id"], {})[stage] = record
    rows = []
    for given in sheet:
        slide_id = given["slide_id"]
        stages = found.get(slide_id, {})
        failure = next((r["failure"] for r in stages.values() if r["status"] == "failed"), None)
        if failure is None and slide_id in duplicates_of:
            message = f"has the same content as slide {duplicates_of[slide_id]}"
            failure = SlideFailure("duplicate", message).record(slide_id, "cohort").as_dict()
        status = "failed" if failure else ("ok" if stages else "excluded")
        address = {"path": shown(given["path"])} if is_remote(given.get("path", "")) else {}
        row: dict[str, Any] = {**given, **address, "site": given.get("site", ""), "status": status}
        row |= {f"failure_{key}": (failure or {}).get(key, "") for key in ("stage", "code", "message", "hint")}
        slide = read_json_if_whole(results / "slides" / slide_id / "slide.json") or {}
        row |= {key: slide.get(key, "") for key in FIGURES if key not in row}
        row["mpp"] = slide.get("mpp", row.get("mpp", ""))
        tissue = read_json_if_whole(results / "slides" / slide_id / "tissue.json") or {}
        row["tissue_mm2"] = tissue.get("area_mm2", "")
        stain = read_json_if_whole(results / "slides" / slide_id / "stain.json") or {}
        row["stain_fit"] = stain.get("method", "") if stain.get("status") == "ok" else stain.get("reason", "")
        if stain and columns_of_stain and stages.get("stain", {}).get("status", "failed") != "failed":  # ok, or no fit
            row |= columns_of_stain(slide_id)
        for stage, record in stages.items():
            if stage.startswith("tiles "):
                row[stage.replace("tiles ", "tiles_")] = record.get("tiles", "")
                row["corrupt_tiles"] = record.get("corrupt", "")
            elif "tool" in record:  # features that were imported
                row["tiles_imported"], row["features_tool"] = record.get("tiles", ""), record["tool"]
                row["features_um"] = "" if record.get("um") is None else record["um"]
                row["features_notes"] = "; ".join(record.get("notes", ()))
        rows.append(row)
    return rows


def failure_rows(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of failures.csv."""
    return [
        {"slide_id": row["slide_id"], **{key: row[f"failure_{key}"] for key in FAILURE_COLUMNS[1:]}}
        for row in rows
        if row["status"] == "failed"
    ]


def check_failed_fraction(rows: list[dict[str, str]], allowed: float, failures: str | Path) -> dict[str, Any]:
    """Counts of a cohort; RunError when more than `allowed` of its slides failed."""
    processed = [row for row in rows if row["status"] != "excluded"]
    failed = [row for row in processed if row["status"] == "failed"]
    fraction = len(failed) / len(processed) if processed else 0.0
    codes: dict[str, int] = {}
    for row in failed:
        codes[row["failure_code"]] = codes.get(row["failure_code"], 0) + 1
    counts = ", ".join(f"{number} {code}" for code, number in sorted(codes.items()))
    if fraction > allowed:
        raise RunError(
            f"{len(failed)} of {len(processed)} slides failed: {counts}. More than max_failed_fraction ({allowed:g}).\n"
            f"Reasons and remedies are in {failures}. Mend or exclude those slides, or raise max_failed_fraction, and "
            "run again: finished slides are kept."
        )
    return {"slides": len(processed), "failed": len(failed), "codes": codes, "fraction": fraction, "allowed": allowed}
