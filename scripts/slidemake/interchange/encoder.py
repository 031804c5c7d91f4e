"""The encoder of features that were made elsewhere: slidemake's record of it, or no more than its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slidemake.core.words import nearest
from slidemake.encoders.registry import EncoderRecord, Source, load_record

UNKNOWN = "none"  # loader of an encoder of which no more than the name is known


def imported_record(features: Mapping[str, Any], known: Mapping[str, Any]) -> EncoderRecord:
    """The record of `features.encoder` (the configuration's section), whose weights nobody needs here."""
    name = str(features["encoder"])
    if name.partition(":")[0] in known:
        return replace(load_record(name, dict(known)), imported=True)
    key, _, variant = name.partition(":")
    return EncoderRecord(
        key=key,
        variant=variant or "given",
        default_variant=variant or "given",
        title=key,
        source=Source(kind="file"),
        loader=UNKNOWN,
        layout="timm",
        architecture=None,
        arguments={},
        resample_position=False,
        tile_px=int(features.get("tile_px") or 1),
        mpp=float(features.get("mpp") or 1.0),
        trained_mpp=(),
        resize=int(features.get("tile_px") or 1),
        crop=int(features.get("tile_px") or 1),
        interpolation="bilinear",
        mean=(),
        std=(),
        prefix_tokens=0,
        pooling="output",
        dim=int(features.get("dim") or 0),
        precision="fp32",
        licence="not known to slidemake",
        gated=False,
        stain="allowed",
        corpora=(),
        reference="",
        imported=True,
    )


def unknown_encoder(features: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """A sentence when slidemake has no record of `features.encoder`; None when it has one."""
    key = str(features["encoder"]).partition(":")[0]
    if key in known:
        return None
    near = nearest(key, known)
    meant = f" (did you mean {near}?)" if near else ""
    return (
        f"features.encoder: slidemake has no record of {key}{meant}: neither the width of its features nor the size of "
        "its tiles is checked, and nobody knows what it was trained on"
    )
