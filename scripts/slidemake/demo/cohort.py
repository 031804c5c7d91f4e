"""The demo cohort: 30 patients of 3 sites with slides that this program draws, and what goes wrong in a lab.

Half of the patients have a small tumour on each of their slides. All slides have follicles and reactive tissue
(granulation tissue, regenerating glands) that is as dark and as crowded as tumour, less of it where there is tumour:
what a slide looks like on average says little about the label, and single tiles have to be found. The sites stain as
differently as real ones: one well balanced, one purple, one pale and pink. A second label, recurrence, follows the site
and nothing in the tissue. Beside the slides, `truth/` keeps masks of tissue and tumour at 1/16 scale and what was done
to each slide.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import (
    committed,
    file_sha256,
    fingerprint,
    read_json_if_whole,
    write_image,
    write_json,
    write_text,
)
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.demo.histology import draw_tissue
from slidemake.demo.layout import CELL, MakeUp
from slidemake.demo.scanner import MPP, SITES, defocus, dust, fold, mark_with_pen, scan, trap_bubble, write_slide

log = logging.getLogger("slidemake")

SHEET_COLUMNS = ("slide_id", "path", "patient_id", "site", "scanner", "scan_date", "diagnosis", "recurrence")
TUMOUR, BENIGN = "tumour", "benign"
RECURRED, FREE = "recurred", "free"
PATIENTS = 30
RECURRENT_SITE, FOLLOWS = "Harbour", 0.9  # site of most recurrences; share of patients whose label is their site's
SIDE = 4608  # px of a slide
TRUNCATED_AT = 0.6  # share of the file that is left
# patient number -> what happened to the first slide; the others are clean
MISHAPS = {2: "pen_blue", 5: "blur", 8: "fold", 11: "pen_green", 14: "bubble", 17: "blur", 20: "fold"}
SECOND_SLIDES = (4, 9)  # one patient of each class has a second good slide
SPOILT = {6: "blank", 13: "no_mpp", 18: "truncated"}  # patient number -> what is wrong with an extra slide


@dataclass(frozen=True)
class Difficulty:
    """What tells slides with a tumour from benign ones. Pairs are shares of the tissue, drawn evenly between the two.

    `abnormal` is tumour and reactive tissue together, drawn alike for both classes, so that slides differ mainly in
    what it is made of (a tumour that is larger than what was drawn stands alone). `atypia`: share of a tumour's
    epithelial cells that look malignant, the others look as in reactive tissue. `stain`: share by which the stains of a
    slide differ from its site's.

    The values were set by looking at what models reach on this very cohort (seed 0), so that attention beats mean
    pooling visibly. What models reach on it is a demonstration and no measurement.
    """

    tumour: tuple[float, float] = (0.03, 0.08)
    abnormal: tuple[float, float] = (0.06, 0.16)
    lymphoid: tuple[float, float] = (0.02, 0.12)
    lymphoid_of_benign: tuple[float, float] = (0.02, 0.12)
    atypia: float = 0.9
    stain: float = 0.12


DEMO = Difficulty()
# Large tumours and no reactive tissue: for tests of what comes after the model, that need one that has learned
EASY = Difficulty((0.06, 0.20), (0.0, 0.0), (0.01, 0.07), (0.04, 0.16), 1.0, 0.1)


def demo_rows(patients: int = PATIENTS, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the demo's sheet (`SHEET_COLUMNS` and `mishap`), in sheet order.

    Sites take turns and each has as many tumour as benign patients (to within one). With 30 patients: 35 rows, of
    which 32 good slides, a blank one, one without a resolution and a truncated one. What happened to a slide is in
    `mishap`, which the sheet does not tell.
    """
    if patients < 1:
        raise RunError(f"demo.patients is {patients}; at least 1 is needed")
    rng, fate = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    sites = list(SITES.values())
    rows = []
    for number in range(1, patients + 1):
        site = sites[(number - 1) % len(sites)]
        diagnosis = (TUMOUR, BENIGN)[(number - 1) // len(sites) % 2]
        taken = date(2023, 1, 9) + timedelta(days=int(rng.integers(0, 900)))
        recurs = (site.name == RECURRENT_SITE) == (fate.random() < FOLLOWS)
        slides = [MISHAPS.get(number, "")] + [""] * (number in SECOND_SLIDES)
        slides += [SPOILT[number]] if number in SPOILT else []
        for letter, mishap in zip("ABC", slides, strict=False):
            slide_id = f"P{number:02d}-{letter}"
            rows.append(
                {
                    "slide_id": slide_id,
                    "path": f"../../demo_slides/{slide_id}.tiff",
                    "patient_id": f"P{number:02d}",
                    "site": site.name,
                    "scanner": site.scanner,
                    "scan_date": taken.isoformat(),
                    "diagnosis": diagnosis,
                    "recurrence": RECURRED if recurs else FREE,
                    "mishap": mishap,
                }
            )
    return rows


def write_demo_sheet(path: str | Path, patients: int = PATIENTS, seed: int = 0) -> None:
    """Write the demo's sample sheet (CSV, without the `mishap` column)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SHEET_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(demo_rows(patients, seed))
    write_text(path, text.getvalue())


def rows_of_sheet(path: str | Path, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a demo sheet, with what happened to each slide; RunError if it is not one of the demo's."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    known = {row["slide_id"]: row["mishap"] for row in demo_rows(99, seed)}
    for line, row in enumerate(rows, start=2):
        drawable = row.get("site") in SITES and row.get("diagnosis") in (TUMOUR, BENIGN)
        if row.get("slide_id") not in known or not drawable:
            raise RunError(
                f"{path}, row {line}: slide {row.get('slide_id')!r} is not one that the demo draws. The demo draws its "
                "own sheet (config/demo/slides.csv) only; give your own slides with --configfile."
            )
        row["mishap"] = known[row["slide_id"]]
    return rows


def slides_folder(path: str | Path, rows: list[dict[str, str]]) -> Path:
    """Folder in which the sheet at `path` expects the demo's slides."""
    folders = {(Path(path).parent / row["path"]).parent for row in rows}
    if len(folders) != 1:
        raise RunError(
            f"{path}: the demo's slides must lie in one folder, not in {len(folders)}: check the path column"
        )
    return Path(os.path.normpath(folders.pop()))


def _slide_rng(seed: int, slide_id: str, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *f"{purpose}:{slide_id}".encode()])


def slide_fingerprint(row: dict[str, str], side: int, seed: int, difficulty: Difficulty = DEMO) -> str:
    """What determines the bytes of a drawn slide."""
    own = {key: row[key] for key in ("slide_id", "site", "diagnosis", "mishap")}
    return fingerprint("demo", row=own, side=side, seed=seed, difficulty=asdict(difficulty))


def draw_demo_slide(
    row: dict[str, str], out_path: str | Path, side: int = SIDE, seed: int = 0, difficulty: Difficulty = DEMO
) -> dict[str, Any]:
    """Draw one slide of `demo_rows` to `out_path` and its truth beside it; returns the truth record.

    `side` px, a multiple of 256, at 0.5 um per px. Writes `truth/<id>_tissue16.png`, `truth/<id>_tumour16.png` (8-bit,
    255 inside, 1/16 scale) and, last, `truth/<id>.json`. The same row, side, seed and difficulty give the same bytes.
    """
    if side % 256 or side < 768:
        raise RunError(f"demo.side is {side}; it must be a multiple of 256 and at least 768")
    out_path, started = Path(out_path), time.perf_counter()
    slide_id, mishap, site = row["slide_id"], row.get("mishap", ""), SITES[row["site"]]
    rng = _slide_rng(seed, slide_id, "tissue")
    has_tumour = row["diagnosis"] == TUMOUR
    share = float(rng.uniform(*difficulty.tumour)) if has_tumour else 0.0
    # Slides without tumour make up for it with tissue that is equally dark on average, of different cells.
    lymphoid = float(rng.uniform(*(difficulty.lymphoid if has_tumour else difficulty.lymphoid_of_benign)))
    reactive = max(0.0, float(rng.uniform(*difficulty.abnormal)) - share)
    pieces, cover = int(rng.choice([1, 1, 2, 3])), float(rng.uniform(0.25, 0.34))
    m = side // CELL
    tissue16 = tumour16 = np.zeros((m, m), bool)
    planes, counts = np.zeros((side, side, 2), np.uint8), {}
    if mishap != "blank":
        drawing = draw_tissue(rng, side, MakeUp(pieces, cover, share, lymphoid, reactive), difficulty.atypia)
        planes, tissue16, tumour16, counts = drawing.planes, drawing.tissue16, drawing.tumour16, drawing.counts
        del drawing

    lab = _slide_rng(seed, slide_id, "lab")
    marred = fold(planes, tissue16, lab) if mishap == "fold" else 0.0
    dust(planes, lab, max(4, side * side // 900_000))
    thickness, eosin = lab.uniform(1 - difficulty.stain, 1 + difficulty.stain, 2)
    rgb = scan(planes, site, lab, float(thickness), float(eosin))
    del planes
    if mishap.startswith("pen_"):
        marred = mark_with_pen(rgb, tissue16, lab, mishap.removeprefix("pen_"))
    elif mishap == "blur":
        marred = defocus(rgb, tissue16, lab)
    elif mishap == "bubble":
        marred = trap_bubble(rgb, tissue16, lab)

    with committed(out_path) as work:
        write_slide(rgb, work, site.quality, None if mishap == "no_mpp" else MPP)
        if mishap == "truncated":
            os.truncate(work, int(work.stat().st_size * TRUNCATED_AT))
    truth = out_path.parent / "truth"
    _write_mask(truth / f"{slide_id}_tissue16.png", tissue16)
    _write_mask(truth / f"{slide_id}_tumour16.png", tumour16)
    record = {
        "slide_id": slide_id,
        "file": out_path.name,
        "fingerprint": slide_fingerprint(row, side, seed, difficulty),
        "sha256": file_sha256(out_path),
        "side": side,
        "mpp": None if mishap == "no_mpp" else MPP,
        "site": site.name,
        "diagnosis": row["diagnosis"],
        "mishap": mishap or None,
        "mishap_fraction": round(marred, 5),
        "mask_scale": CELL,
        "tissue_fraction": round(float(tissue16.mean()), 5),
        "tumour_fraction": round(float(tumour16.sum() / max(tissue16.sum(), 1)), 5),
        "tissue_pieces": pieces if tissue16.any() else 0,
        "drawn": counts,
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json(truth / f"{slide_id}.json", record)
    return record


def _write_mask(path: Path, mask: np.ndarray) -> None:
    from PIL import Image

    write_image(path, Image.fromarray(mask.astype(np.uint8) * 255), format="PNG")


def _finished(row: dict[str, str], folder: Path, side: int, seed: int) -> dict[str, Any] | None:
    """The truth record of a slide that is already there, whole and drawn from the same row, side and seed."""
    record = read_json_if_whole(folder / "truth" / f"{row['slide_id']}.json")
    slide = folder / f"{row['slide_id']}.tiff"
    if record is None or record.get("fingerprint") != slide_fingerprint(row, side, seed) or not slide.is_file():
        return None
    return record if file_sha256(slide) == record["sha256"] else None


def draw_demo_cohort(
    rows: Iterable[dict[str, str]],
    folder: str | Path,
    manifest: str | Path,
    side: int = SIDE,
    seed: int = 0,
    processes: int = 2,
) -> list[dict[str, Any]]:
    """Draw the slides of `rows` into `folder`, with `processes` side by side, and write `manifest` last.

    Finished slides (same fingerprint, same bytes) are kept, so a killed job goes on where it stopped. Returns the
    truth records in sheet order. Worker processes are started afresh (spawn): the calling script needs the usual
    `if __name__ == "__main__"`.
    """
    rows, folder, started = list(rows), Path(folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    records = {row["slide_id"]: _finished(row, folder, side, seed) for row in rows}
    waiting = [row for row in rows if records[row["slide_id"]] is None]
    log.info("demo: %d slides, %d already drawn", len(rows), len(rows) - len(waiting))

    def done(record: dict[str, Any], count: int) -> None:
        records[record["slide_id"]] = record
        what = f"{record['diagnosis']}, {record['mishap']}" if record["mishap"] else record["diagnosis"]
        log.info("demo %d/%d %s: drawn (%s, %.1f s)", count, len(waiting), record["slide_id"], what, record["seconds"])

    if processes > 1 and len(waiting) > 1:
        with ProcessPoolExecutor(min(processes, len(waiting)), mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(draw_demo_slide, row, folder / f"{row['slide_id']}.tiff", side, seed) for row in waiting
            ]
            try:
                for count, job in enumerate(as_completed(jobs), start=1):
                    done(job.result(), count)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        for count, row in enumerate(waiting, start=1):
            done(draw_demo_slide(row, folder / f"{row['slide_id']}.tiff", side, seed), count)

    finished = [record for row in rows if (record := records[row["slide_id"]]) is not None]
    write_json(
        manifest,
        {
            "stage": "demo",
            "version": STAGE_VERSIONS["demo"],
            "side": side,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 3),
            "slides": [{**record, "status": "ok", "failure": None} for record in finished],
        },
    )
    return finished
