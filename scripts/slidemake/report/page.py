"""The report: one HTML file with everything that a reader of the results asks for, and no need of a network.

Everything that comes from the sheet, a file name or an error is escaped (Jinja2 autoescape). Pictures are embedded.
Cohorts of thousands stay readable: all failures and figures, but only the first `max_slides` slides with pictures.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slidemake.core.files import read_json, read_json_if_whole, versions, write_text
from slidemake.core.stages import STAGES
from slidemake.core.tables import read_table
from slidemake.core.words import duration
from slidemake.jobs.racks import read_manifests
from slidemake.report import figures
from slidemake.report.comparison import comparison_section
from slidemake.report.drift import drift_section
from slidemake.report.imported import imported_section
from slidemake.report.pictures import stain_sentences
from slidemake.report.stress import stress_section
from slidemake.report.task import measured_section
from slidemake.report.timeline import timeline_section
from slidemake.tasks.controls import SHUFFLED

TEMPLATES = Path(__file__).parent / "templates"
ALIKE = 3  # lines of a verdict of one kind that are all shown


def picture(path: str | Path) -> str | None:
    """`data:` address of a JPEG or PNG; None when there is none."""
    path = Path(path)
    if not path.exists():
        return None
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def small_picture(path: str | Path, width: int, quality: int = 82) -> str | None:
    """`data:` address of a picture reduced to `width` px; None when there is none."""
    from io import BytesIO

    from PIL import Image

    if not Path(path).exists():
        return None
    with Image.open(path) as source:
        image: Image.Image = source.convert("RGB")
        if image.width > width:
            size = (width, max(1, round(image.height * width / image.width)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        out = BytesIO()
        image.save(out, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def stage_times(results: Path, manifests: list[str]) -> list[dict[str, Any]]:
    """Seconds, slides and tiles of each stage, from the manifests; slides found finished do not count."""
    found: dict[str, dict[str, Any]] = {}
    for path in manifests:
        parts = Path(path).relative_to(results / "manifests").parts
        title = (STAGES[parts[0]].title or parts[0]) + (f" ({'/'.join(parts[1:-1])})" if len(parts) > 2 else "")
        row = found.setdefault(title, {"stage": title, "seconds": 0.0, "slides": 0, "reused": 0, "tiles": 0})
        for record in read_manifests([path]):
            if record["status"] != "ok":
                continue
            if record.get("reused"):
                row["reused"] += 1
                continue
            row["slides"] += 1
            row["seconds"] += record.get("seconds", 0.0)
            row["tiles"] += record.get("tiles", 0) or 0
    for row in found.values():
        row["rate"] = row["tiles"] / row["seconds"] if row["tiles"] and row["seconds"] else None
    return list(found.values())


def slide_cards(results: Path, rows: list[dict[str, str]], limit: int) -> list[dict[str, Any]]:
    """What the cohort table shows of each slide, pictures included; where not all are shown, failed slides first, then
    those whose tissue is unsure.
    """

    def rank(row: dict[str, str]) -> tuple[bool, bool]:
        tissue = read_json_if_whole(results / "slides" / row["slide_id"] / "tissue.json") or {}
        return row["status"] != "failed", "unsure" not in tissue.get("flags", [])

    cards = []
    for row in rows if len(rows) <= limit else sorted(rows, key=rank)[:limit]:
        folder = results / "slides" / row["slide_id"]
        tissue = read_json_if_whole(folder / "tissue.json") or {}
        tiles = {key.removeprefix("tiles_"): value for key, value in row.items() if key.startswith("tiles_") and value}
        cards.append(
            {
                "row": row,
                "thumbnail": small_picture(folder / "thumbnail.jpg", 150),
                "tissue": small_picture(folder / "tissue.jpg", 300),
                "flags": tissue.get("flags", []),
                "unsure": "unsure" in tissue.get("flags", []),
                "qc": {k: v for k, v in tissue.get("qc", {}).items() if k.endswith("_fraction") and v is not None},
                "tiles": sum(int(float(value)) for value in tiles.values()),
            }
        )
    return cards


def task_section(
    results: Path, task: str, models: list[str], explained: str | None, slides: set[str], compared: bool = False
) -> dict[str, Any]:
    """Metrics, curves, pictures and warnings of one task; explanations of `slides`, whatever else lies there.

    `compared`: what stain normalisation does is asked for; else what an earlier run says of it is not shown.
    """
    folder = results / "tasks" / task
    metrics, curves = read_json(folder / "metrics.json"), read_json(folder / "curves.json")
    splits = read_json_if_whole(folder / "splits.json") or {}
    main = models[0]
    scopes = metrics["models"][main]["scopes"]
    common = {
        "name": task,
        "metrics": metrics,
        "main": main,
        "splits": splits,
        "sites": {name.removeprefix("site:"): s for name, s in scopes.items() if name.startswith("site:")},
        "folds": {name.removeprefix("fold:"): s for name, s in scopes.items() if name.startswith("fold:")},
        "explained": explanations(results, task, explained, slides) if explained else None,
        "stress": stress_section(folder / main),
        "comparison": comparison_section(folder),
        "training": training_section(folder, models),
        "stain": read_json_if_whole(folder / "stain.json") if compared else None,
        "shortcuts": {path.stem: read_json(path) for path in sorted((folder / "shortcuts").glob("*.json"))},
    }
    return {**common, **measured_section(folder, metrics, curves, splits, main)}


def training_section(folder: Path, models: list[str]) -> list[dict[str, str]]:
    """What the training of a task's models said about itself (`training.words`), models that say the same together."""
    of_text: dict[str, dict[str, Any]] = {}
    for model in [model for model in models if model != SHUFFLED]:  # whose labels tell nothing
        for finding in (read_json_if_whole(folder / model / "train.json") or {}).get("findings", ()):
            of_text.setdefault(finding["text"], {**finding, "models": []})["models"].append(model)
    return [
        {**found, "text": f"Training of {', '.join(found['models'])}: {found['text']}"} for found in of_text.values()
    ]


def external_section(folder: Path) -> dict[str, Any] | None:
    """A bundle's metrics on a cohort of known outcomes; None where there are none."""
    metrics = read_json_if_whole(folder / "metrics.json")
    if metrics is None:
        return None
    main = metrics["external"]["model"]
    scopes, curves = metrics["models"][main]["scopes"], read_json(folder / "curves.json")
    sites = {name.removeprefix("site:"): s for name, s in scopes.items() if name.startswith("site:")}
    body = measured_section(folder, metrics, curves, {}, main)
    return {"metrics": metrics, "main": main, "sites": sites, **body}


def explanations(results: Path, task: str, model: str, wanted: set[str], limit: int = 60) -> dict[str, Any]:
    """Heatmaps and tile galleries of the explained slides, and how well attention finds annotated tumour.

    Only of `wanted` slides: files of slides that have left the sheet stay in their folders.
    """
    import statistics

    folder = results / "explain" / task / model
    slides: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/explain.json")):
        described = read_json_if_whole(path) if path.parent.name in wanted else None
        if described is None:
            continue
        described["pictures"] = {}
        if len(slides) < limit:
            for name, width in (("heatmap", 900), ("top", 900), ("bottom", 900)):
                source = path.with_name(f"{name}.png" if name == "heatmap" else f"{name}.jpg")
                described["pictures"][name] = small_picture(source, width)
        slides.append(described)
    found = [s["tile_auroc"] for s in slides if s.get("tile_auroc") is not None]
    slides.sort(key=lambda s: (-(s.get("probability") or 0.0), s["slide_id"]))
    return {
        "model": model,
        "slides": slides,
        "tile_auroc": {"median": statistics.median(found), "n": len(found), "low": min(found), "high": max(found)}
        if found
        else None,
    }


def explained_slides(manifests: list[str], task: str, rows: list[dict[str, str]]) -> set[str]:
    """Slides that the task's explanation vouches for and that are still in the cohort."""
    paths = [path for path in manifests if Path(path).parts[-4:-2] == ("explain", task)]
    explained = {record["slide_id"] for record in read_manifests(paths, "explain") if record["status"] == "ok"}
    return explained & {row["slide_id"] for row in rows if row["status"] == "ok"}


def write_report(
    results: Path,
    out: Path,
    *,
    title: str,
    tasks: dict[str, dict[str, Any]],
    manifests: list[str],
    config: dict[str, Any],
    encoders: dict[str, dict[str, Any]],
    stain_pictures: list[dict[str, Any]],
    command: str,
    max_slides: int = 200,
) -> None:
    """Write report/index.html.

    `tasks` maps a task to {"models": [...], "explained": model or None}; `stain_pictures` are those of
    `pictures.stain_pictures`; `config` is the validated configuration.
    """
    rows = read_table(results / "cohort" / "slides.csv")
    failures = read_table(results / "cohort" / "failures.csv")
    sites: dict[str, dict[str, int]] = {}
    for row in rows:
        count = sites.setdefault(row.get("site") or "no site", {"slides": 0, "failed": 0})
        count["slides"] += 1
        count["failed"] += row["status"] == "failed"
    stages = stage_times(results, manifests)
    for stain in stain_pictures:
        stain["picture"] = picture(stain["path"])
    html = (
        template_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=(TEMPLATES / "report.css").read_text(),
            rows=rows,
            cards=slide_cards(results, rows, max_slides),
            imported=imported_section(rows),
            failures=failures,
            sites=sites,
            patients=len({row["patient_id"] for row in rows}),
            tiles=sum(int(float(v)) for row in rows for k, v in row.items() if k.startswith("tiles_") and v),
            drift=drift_section(results),
            tasks=[
                task_section(
                    results,
                    name,
                    t["models"],
                    t.get("explained"),
                    explained_slides(manifests, name, rows),
                    bool(config.get("stain", {}).get("compare")),
                )
                for name, t in tasks.items()
            ],
            stages=stages,
            timeline=timeline_section(results),
            stage_figure=figures.throughput([s for s in stages if s["seconds"] > 0]),
            stains=stain_pictures,
            stain_sentences=stain_sentences(rows),
            encoders=encoders,
            config=json.dumps(config, indent=2, sort_keys=True, default=str),
            versions=versions(),
            command=command,
            external=external_section(results / "predictions"),
            fingerprints=_fingerprints(results, tasks),
        )
    )
    write_text(out, html)


def _fingerprints(results: Path, tasks: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for task, about in tasks.items():
        for model in about["models"]:
            trained = read_json_if_whole(results / "tasks" / task / model / "train.json") or {}
            if trained.get("fingerprint"):
                found.append((f"{task} / {model}", trained["fingerprint"]))
    return found


def template_environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["p_value"] = _p_value
    environment.filters["duration"] = _duration
    environment.filters["interval"] = _interval
    environment.filters["cell"] = _cell
    environment.filters["counts"] = _counts
    environment.filters["alike"] = _alike
    environment.filters["counted"] = lambda values: Counter(values).most_common()
    return environment


def _number(value: Any, digits: int = 2) -> str:
    """A figure for people: `0.91`, `12,345`, and a dash for none."""
    if value in (None, ""):
        return "–"
    number = float(value)
    return f"{number:,.0f}" if digits == 0 or abs(number) >= 1000 else f"{number:.{digits}f}"


def _counts(found: Mapping[str, int]) -> str:
    """Patients of each class: `12 benign, 17 tumour`; of labels that are numbers: `label 1: 12, label 2: 17`."""
    if any(name.replace(".", "", 1).isdigit() for name in found):
        return ", ".join(f"label {name}: {n}" for name, n in found.items())
    return ", ".join(f"{n} {name}" for name, n in found.items())


def _alike(lines: list[dict[str, str]]) -> list[tuple[dict[str, str], list[dict[str, str]]]]:
    """Lines of a verdict in their order; of more than three of one kind (a sweep has many models) the first, and the
    others to be folded away beside it."""
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in lines:
        kinds.setdefault((line["level"], line["code"]), []).append(line)
    found: list[tuple[dict[str, str], list[dict[str, str]]]] = []
    for line in lines:
        same = kinds[line["level"], line["code"]]
        if len(same) <= ALIKE:
            found.append((line, []))
        elif line is same[0]:
            found.append((line, same[1:]))
    return found


def _p_value(value: float | None) -> str:
    """A p-value, and no 0.000."""
    return "< 0.001" if value is not None and value < 0.0005 else _number(value, 3)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _cell(metric: dict[str, Any] | None) -> Any:
    """A figure above its interval, for tables of many columns."""
    from markupsafe import Markup

    if not metric or metric["value"] is None:
        return "–"
    if metric["low"] is None:
        return f"{metric['value']:.2f}"
    return Markup('{:.2f}<br><span class="range">{:.2f} to {:.2f}</span>').format(
        metric["value"], metric["low"], metric["high"]
    )


def _interval(metric: dict[str, Any] | None) -> str:
    if not metric or metric["value"] is None:
        return "–"
    if metric["low"] is None:
        return f"{metric['value']:.2f}"
    return f"{metric['value']:.2f} ({metric['low']:.2f} to {metric['high']:.2f})"
