"""What a plan knows of features that are imported: which encoder they are of, which slides have none."""

from __future__ import annotations

import os
from typing import Any

from slidemake.cohort.sheet import SlideRow
from slidemake.core.failures import RunError
from slidemake.core.words import some
from slidemake.encoders.registry import EncoderRecord
from slidemake.interchange.encoder import imported_record, unknown_encoder
from slidemake.interchange.sources import feature_files, of_no_slide


def imported_encoder(
    raw: dict[str, Any], config: dict[str, Any], bundle: dict[str, Any] | None, known: dict[str, Any]
) -> EncoderRecord:
    """The record of the features that are imported. RunError where models or a bundle were meant for others."""
    if not config["features"]["encoder"]:
        raise RunError(
            f"bundle: {config['bundle']} was trained on features of {bundle and bundle['encoder']['key']} that were "
            "imported; give those of the new slides: features.encoder and features.folder."
        )
    record = imported_record(config["features"], known)
    models = raw.get("models") if isinstance(raw.get("models"), dict) else {}
    for name, model in (models or {}).items():
        asked = model.get("encoder") if isinstance(model, dict) else None
        if asked and str(asked) not in (record.name, config["features"]["encoder"]):
            raise RunError(
                f"models.{name}.encoder: {asked} is asked for, and the imported features are of {record.name}. "
                "Leave encoder out, or compare encoders in runs of their own."
            )
    if bundle and (bundle["encoder"].get("key"), bundle["encoder"].get("variant")) != (record.key, record.variant):
        raise RunError(
            f"bundle: {config['bundle']} was trained on features of {bundle['encoder'].get('key')}:"
            f"{bundle['encoder'].get('variant')}, and features.encoder says {record.key}:{record.variant}."
        )
    return record


def feature_notes(rows: list[SlideRow], features: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Sentences: what a look at names alone tells of the features (the configuration's section) of a sheet's rows."""
    notes = [note] if (note := unknown_encoder(features, known)) else []
    wanted = [row for row in rows if not row.exclude]
    without = [row.slide_id for row in wanted if not any(map(os.path.exists, feature_files(row, features["folder"])))]
    if without:
        notes.append(
            f"{len(without)} of {len(wanted)} slides have no file of features ({some(without, 5)}) and will fail"
        )
    if extra := of_no_slide(rows, features["folder"]):
        notes.append(f"{len(extra)} files of features are of no slide of the sheet: {some(extra, 5)}")
    return notes
