"""The stage `import`: the features of a rack's slides, from files of other tools, become embedding stores as our own.

Nothing is embedded and no slide is read. What the files say of the encoder is kept and compared with what the
configuration says; what does not fit is a failure of that slide, or a note that travels to the report.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.content import content_identity
from slidemake.core.failures import SlideFailure
from slidemake.core.files import committed, fingerprint, read_json_if_whole, write_json
from slidemake.encoders.registry import EncoderRecord
from slidemake.interchange.encoder import UNKNOWN
from slidemake.interchange.features import Features, refused
from slidemake.interchange.placing import Cut, Placed, place, scale_note
from slidemake.interchange.reading import open_features
from slidemake.stores.arrays import ArrayWriter, write_array, write_group
from slidemake.stores.integrity import seal
from slidemake.stores.tile_store import store_fingerprint

log = logging.getLogger("slidemake")
FORMAT, FORMAT_VERSION = "slidemake-embeddings", 1  # of an embedding store, whoever embedded
NO_STAIN = {"method": "none", "target": None, "slide": None}  # slidemake normalised nothing; others may have
Record = dict[str, Any]


def import_slide(
    row: Mapping[str, Any], files: list[str], record: EncoderRecord, options: Mapping[str, Any], results: Path
) -> Record:
    """Import the features of one slide and return its figures for the manifest.

    row: slide_id, and mpp of the sheet or None. files: what `sources.feature_files` found. options: the configuration's
    `features` (format, mapping, tile_px, mpp, dim). Raises SlideFailure missing_features or wrong_features.
    """
    slide_id = row["slide_id"]
    path = _the_file(files)
    slide = _slide(results, slide_id, row)
    identity = content_identity(path)
    known = {key: options.get(key) for key in ("format", "mapping", "tile_px", "mpp", "dim")}
    mark = fingerprint(
        "import", features=identity, encoder=record.name, cut=_cut(record, options).__dict__, options=known, slide=slide
    )
    out = results / "embeddings" / record.slug / f"{slide_id}.zarr"
    if store_fingerprint(out) == mark:
        attributes = (read_json_if_whole(out / "zarr.json") or {})["attributes"]
        return {"fingerprint": mark, "reused": True, **attributes["imported"], "identity": identity}
    try:
        with open_features(path, options.get("format") or "auto", options.get("mapping")) as found:
            about = _write(out, slide_id, path, found, record, options, slide, mark, identity)
    except FileNotFoundError as error:
        raise SlideFailure("missing_features", f"{path} went away while it was read") from error
    if about["notes"]:
        log.warning("%s: %s", slide_id, "; ".join(about["notes"]))
    return {"fingerprint": mark, **about, "identity": identity}


def _the_file(files: list[str]) -> Path:
    if len(files) > 1:
        listed = ", ".join(Path(file).name for file in files[:4])
        raise refused(
            files[0],
            f"is one of {len(files)} files for this slide ({listed})",
            "Name one in the sheet's column features.",
        )
    if not files:
        raise SlideFailure("missing_features", "neither the sheet nor features.folder gives a file of features")
    if not Path(files[0]).exists():
        raise SlideFailure("missing_features", f"there is no file {files[0]}")
    return Path(files[0])


def _slide(results: Path, slide_id: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a slide besides its features: its size, where its file is there; its um per px."""
    screened = read_json_if_whole(results / "slides" / slide_id / "slide.json") or {}
    found = {key: screened.get(key) for key in ("width", "height", "mpp")} if screened.get("status") == "ok" else {}
    found["mpp"] = row.get("mpp") or found.get("mpp")
    return {key: value for key, value in found.items() if value}


def _cut(record: EncoderRecord, options: Mapping[str, Any]) -> Cut:
    """What the configuration says of the tiles, and what the record does where it is one of a known encoder."""
    known = record.loader != UNKNOWN
    return Cut(
        options.get("tile_px") or (record.tile_px if known else None),
        options.get("mpp") or (record.mpp if known else None),
        record.resize if known else None,
        options.get("dim") or (record.dim if known else None),
    )


def _write(
    out: Path,
    slide_id: str,
    path: Path,
    found: Features,
    record: EncoderRecord,
    options: Mapping[str, Any],
    slide: dict[str, Any],
    mark: str,
    identity: str,
) -> Record:
    """Check the features and commit their store; returns what the manifest and the report say of them."""
    count, width = found.shape
    if not count:
        raise SlideFailure("too_few_tiles", f"{path.name} holds features of no tile", "Exclude the slide.")
    cut = _cut(record, options)
    if cut.dim and width != cut.dim:
        raise refused(path, f"has features of width {width}, and {record.name} gives {cut.dim}", _WIDTH)
    placed = place(path, found, slide, cut)
    notes = [*placed.notes, *_encoder_notes(found, placed, record)]
    encoder = identity_of(record, placed, width)
    about = {
        "tool": found.tool,
        "file": str(path),
        "tiles": count,
        "um": round(placed.um, 3) if placed.um else None,
        "coordinates": placed.coords is not None,
        "notes": notes,
    }
    coords = np.full((count, 2), -1, np.int32) if placed.coords is None else placed.coords
    with committed(out) as work:
        with ArrayWriter(work, "features", (count, width), found.dtype) as features:
            for block in _finite(path, found):
                features.append(block)
        write_array(work, "coords", coords)
        write_group(
            work,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "slide_id": slide_id,
                "encoder": encoder,
                "stain": NO_STAIN,
                "tiles_fingerprint": None,
                "identity": identity,
                "grid": f"{placed.tile_px or '?'}px_{placed.tile_mpp or 0:g}mpp",
                "mpp": {"requested": placed.tile_mpp, "source": placed.mpp, "source_of": placed.mpp_source},
                "tile_level0_px": [placed.tile, placed.tile] if placed.tile else None,
                "stride_level0_px": placed.stride,
                "imported": about,
                "said": {**found.said, "encoder": found.encoder},
                "fingerprint": mark,
                "engine": None,
            },
        )
        seal(work)
    return about


_WIDTH = "Is features.encoder what made these files? Name the right one (key:variant), or set features.dim."


def _finite(path: Path, found: Features) -> Any:
    row = 0
    try:
        for block in found.blocks():
            good = np.isfinite(block).all(1)
            if not good.all():
                raise refused(
                    path,
                    f"has features that are not finite: {int((~good).sum())} tiles of a block, the first is tile "
                    f"{row + int((~good).argmax())}",
                    "Make these features again; half precision overflows at 65504.",
                )
            row += len(block)
            yield block
    except (OSError, RuntimeError, ValueError) as error:
        raise refused(path, f"does not read to its end: {error}", "Copy it again.") from error


def identity_of(record: EncoderRecord, placed: Placed, width: int | None) -> dict[str, Any]:
    """What an embedding store says of an encoder whose weights were elsewhere: features of equal identities may be in
    one cohort. The tool is not a part of it: a file that was converted holds the same features.
    """
    cut = {"tile_px": placed.tile_px, "mpp": placed.tile_mpp}
    return {
        "key": record.key,
        "variant": record.variant,
        "weights_sha256": "imported",
        "transform_sha256": "imported",
        "precision": "imported",
        "dim": width,
        "architecture": record.architecture or record.loader,
        **{key: value for key, value in cut.items() if value},
    }


def _encoder_notes(found: Features, placed: Placed, record: EncoderRecord) -> list[str]:
    notes = []
    known = Cut(record.tile_px, record.mpp, record.resize) if record.loader != UNKNOWN else Cut()
    if note := scale_note(record.name, placed, known):
        notes.append(note)
    if found.encoder and not same_name(found.encoder, record.key):
        notes.append(f"the file says that its encoder is {found.encoder}, and features.encoder says {record.name}")
    return notes


def same_name(one: str, other: str) -> bool:
    """Whether two names may be of one encoder: `uni_v1`, `mahmood-uni` and `UNI` against `uni`."""
    plain = ["".join(c for c in text.lower() if c.isalnum()) for text in (one, other)]
    return plain[0] in plain[1] or plain[1] in plain[0]


def screen_or_pass(slide_id: str, screen: Any, results: Path) -> Record:
    """Screening where features are imported: a slide whose file is not there, or cannot be read, is no failure.

    screen: what screens it, or None where the sheet gives no path. slide.json then says that there is no slide.
    """
    why = "the sheet gives no file"
    if screen is not None:
        try:
            return screen()
        except SlideFailure as failure:
            why = f"{failure.code}: {failure}"
    mark = fingerprint("screen", slide_id=slide_id, absent=True)
    target = results / "slides" / slide_id / "slide.json"
    for picture in ("thumbnail.jpg", "overview.jpg"):
        target.with_name(picture).unlink(missing_ok=True)
    write_json(target, {"slide_id": slide_id, "status": "absent", "why": why, "fingerprint": mark})
    return {"fingerprint": mark, "absent": why}
