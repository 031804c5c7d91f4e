"""Where a run embeds, and in which precision: decided once, before its first job, and kept with the results.

`precision: auto` is what the embeddings that are there have, so that a run which goes on elsewhere (a laptop after the
cluster, one node without its driver) never mixes two; for the first ones it is what suits the device. A bundle takes
features of its own precision only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.files import read_json_if_whole
from slidemake.core.marker import read_marker
from slidemake.encoders.registry import EncoderRecord
from slidemake.jobs.devices import Promise
from slidemake.jobs.racks import Machine

KEY = "embedding"  # in slidemake.json of the results folder


def embedding_place(
    settings: Mapping[str, Any],
    encoders: Mapping[str, EncoderRecord],
    output: str,
    machine: Machine,
    *,
    bundle: Mapping[str, Any] | None = None,
    in_job: bool = False,
) -> dict[str, Any]:
    """{"gpu": who promises a GPU (`devices.Promise`), "precisions": {encoder's folder: fp32 | tf32 | fp16 | bf16}}.

    `settings`: the section `embedding`. `in_job`: in a job on whatever node what its run decided holds. Raises RunError
    where a bundle was trained in another precision than the one that is set.
    """
    kept = read_marker(output).get(KEY)
    if in_job and isinstance(kept, dict) and set(kept["precisions"]) >= set(encoders):
        return {"gpu": kept["gpu"], "precisions": {slug: kept["precisions"][slug] for slug in encoders}}
    gpu: Promise = "" if settings["device"] == "cpu" else "cluster" if machine.cluster else "here"
    if gpu == "here" and not machine.gpu:
        gpu = ""
    on_gpu = bool(gpu) or settings["device"] == "cuda"
    chosen = {}
    for slug, record in encoders.items():
        own = record.precision if on_gpu else "fp32"
        chosen[slug] = settings["precision"]
        if bundle is not None:
            chosen[slug] = _of_bundle(bundle, settings["precision"], own)
        elif settings["precision"] == "auto":
            chosen[slug] = found_precision(Path(output), slug, kept) or own
    return {"gpu": gpu, "precisions": chosen}


def _of_bundle(bundle: Mapping[str, Any], wanted: str, own: str) -> str:
    trained = bundle["encoder"].get("precision")
    if trained and wanted not in ("auto", trained):
        raise RunError(
            f"embedding.precision is {wanted}, and the bundle was trained on features in {trained}, which are not the "
            f"same. Set embedding.precision to auto or {trained}."
        )
    return trained or (own if wanted == "auto" else wanted)


def found_precision(output: Path, slug: str, kept: Any) -> str | None:
    """Precision of the embeddings by an encoder that are in the results; None where there are none.

    `kept`: what the marker says, which holds as long as there are any; older results are asked themselves.
    """
    stores = (path for path in (output / "embeddings" / slug).glob("*.zarr") if not path.name.startswith("."))
    first = next(stores, None)
    if first is None:
        return None
    if isinstance(kept, dict) and slug in kept["automatic"]:
        return str(kept["automatic"][slug])
    attributes = (read_json_if_whole(first / "zarr.json") or {}).get("attributes", {})
    return attributes.get("encoder", {}).get("precision")


def marked_place(found: Mapping[str, Any], settings: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """What the marker is to say of the place, for the run's jobs and for later runs. `found`: the marker as it is.

    `automatic`: what `precision: auto` chose, which a precision that somebody sets for a while does not change.
    """
    automatic = dict((found.get(KEY) or {}).get("automatic", {}))
    if settings["precision"] == "auto":
        automatic |= place["precisions"]
    return {"gpu": place["gpu"], "precisions": dict(place["precisions"]), "automatic": automatic}


def precision_hint(
    settings: Mapping[str, Any], encoders: Mapping[str, EncoderRecord], place: Mapping[str, Any]
) -> str | None:
    """What to say of embeddings that keep a precision which would not be chosen here for new ones."""
    if settings["precision"] != "auto":
        return None
    on_gpu = bool(place["gpu"]) or settings["device"] == "cuda"
    for slug, precision in place["precisions"].items():
        own = encoders[slug].precision if on_gpu else "fp32"
        if precision != own:
            return (
                f"features by {slug} stay in {precision}, as those that are there; embedding.precision: {own} would "
                "suit this machine better, and computes them and what follows anew"
            )
    return None
