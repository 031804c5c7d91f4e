"""Slides at an address (s3://, https://): fetched through Snakemake's storage plugins, checked, whole or absent.

The plugin that knows an address gives credentials and settings, from the environment as its documentation says
(AWS_ACCESS_KEY_ID, SNAKEMAKE_STORAGE_S3_ENDPOINT_URL, SNAKEMAKE_STORAGE_HTTP_AUTH, ...), and fetches. Of http(s) the
transfer is `remote_http`'s, because the plugin's cannot tell an error page from a slide. Why slides are not declared as
inputs in storage: docs/decisions/0013-slides-at-an-address.md.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slidemake.core.addresses import is_remote, local_copy, local_name, shown
from slidemake.core.currency import PASSING
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import file_sha256, fingerprint, read_json_if_whole, write_json
from slidemake.jobs import isolation
from slidemake.slides.remote_access import Refused
from slidemake.slides.remote_http import download, stamp

log = logging.getLogger("slidemake")

RECORD = "fetched+.json"  # beside a fetched slide; `+` cannot be in a name that comes from an address or a slide_id
_REGISTRY = threading.Lock()
WAIT = 1.0  # s before the second attempt, then twice as long each time
PACKAGES = {"gs": "gcs", "gcs": "gcs", "az": "azure", "sftp": "sftp", "ftp": "ftp", "s3": "s3"}


# -- storage plugins -------------------------------------------------------------------------------------------------


def plugin_of(uri_scheme: str) -> Any:
    """The storage plugin for addresses of a scheme. Raises RunError when none is installed, or several would do."""
    with _REGISTRY:  # threads fetch side by side, and the registry fills itself when it is first asked
        return _plugin_of(uri_scheme)


@cache
def _plugin_of(uri_scheme: str) -> Any:
    from snakemake_interface_storage_plugins.registry import StoragePluginRegistry

    plugins = StoragePluginRegistry().plugins
    fit = [p for p in plugins.values() if p.storage_provider.is_valid_query(f"{uri_scheme}://host/file.svs")]
    if len(fit) != 1:
        package = f"snakemake-storage-plugin-{PACKAGES.get(uri_scheme, uri_scheme)}"
        known = ", ".join(sorted(p.name for p in plugins.values())) or "none"
        what = "several storage plugins take" if fit else "no storage plugin of Snakemake that is installed takes"
        remedy = f"keep one of {', '.join(p.name for p in fit)}" if fit else f"pip install {package} (there: {known})"
        raise RunError(f"{what} {uri_scheme}:// addresses: {remedy}, or copy the slides to a file system")
    return fit[0]


def provider_of(uri: str, folder: Path) -> Any:
    """The plugin's provider, with its settings from the environment."""
    plugin = plugin_of(urlsplit(uri).scheme.lower())
    return plugin.storage_provider(local_prefix=folder, logger=log, settings=settings_of(plugin))


def settings_of(plugin: Any) -> Any:
    """A plugin's settings: SNAKEMAKE_STORAGE_<PLUGIN>_<SETTING> for each, as Snakemake itself reads credentials."""
    if plugin.settings_cls is None:
        return None
    settings = plugin.settings_cls()
    for field in dataclasses.fields(settings):
        name = f"SNAKEMAKE_STORAGE_{plugin.name}_{field.name}".upper().replace("-", "_")
        text = os.environ.get(name)
        if text:
            parse: Callable[[str], Any] = field.metadata.get("parse_func") or _parser(field)
            setattr(settings, field.name, parse(text))
    return settings


def _parser(field: dataclasses.Field) -> Callable[[str], Any]:
    kinds = str(field.type)
    if "bool" in kinds:
        return lambda text: text.strip().lower() in ("1", "true", "yes")
    if "int" in kinds:
        return int
    return float if "float" in kinds else str


def check_addresses(paths: Iterable[str]) -> None:
    """Whether a storage plugin is there for every address. Nothing is asked over the network. Raises RunError."""
    problems = []
    for scheme in sorted({urlsplit(path).scheme.lower() for path in paths if is_remote(path)}):
        try:
            plugin_of(scheme)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError("The sample sheet has addresses that cannot be fetched:\n  " + "\n  ".join(problems))


# -- fetching --------------------------------------------------------------------------------------------------------


def fetch_slide(
    slide_id: str, uri: str, wanted: str | None, folder: Path, options: dict[str, Any], remedy: str = ""
) -> dict[str, Any]:
    """Fetch a slide into `folder/slide_id/`; found there whole, it is not fetched again.

    wanted: SHA-256 of the sheet, or None. options: the section `remote` of the configuration. remedy: how to try
    again, where that is of use. Returns {"uri" as it may be shown, "source" (hash of all of it), "bytes", "sha256"
    (None of a folder), "checked" (against the sheet), "stamp" (of the server, or None)}. Raises SlideFailure
    missing_file, unreachable, wrong_checksum or unsupported; OSError of the local disk.
    """
    target, part = folder / slide_id, folder / f"{slide_id}+part"
    folder.mkdir(parents=True, exist_ok=True)
    with isolation.unhurried(), alone(folder / f"{slide_id}+lock"):  # a transfer has limits of its own
        before = read_json_if_whole(target / RECORD)
        if before and before["source"] == source_of(uri) and _same(target / local_name(uri), before, wanted):
            return before
        same = ""
        for attempt in range(1, options["attempts"] + 1):
            try:
                stamp = _fetch(uri, part / local_name(uri), options, checked=wanted is not None)
                found = _checked(part / local_name(uri), uri, wanted) | {"stamp": stamp}
                break
            except SlideFailure as failure:
                passing = failure.code in ("unreachable", "wrong_checksum") and not isinstance(failure, Refused)
                if failure.code == "wrong_checksum":
                    shutil.rmtree(part)
                    passing, same = str(failure) != same, str(failure)  # the same bytes twice: they are what is there
                if not passing or attempt == options["attempts"]:
                    shutil.rmtree(part, ignore_errors=True)
                    tries = f" ({attempt} attempts)" if attempt > 1 else ""
                    again = remedy if failure.code in PASSING else ""
                    hint = f"{failure.hint} {again}".strip()
                    raise SlideFailure(failure.code, f"{failure.message}{tries}", hint) from failure
                log.warning("slide %s: %s; trying again", slide_id, failure)
                time.sleep(WAIT * 2 ** (attempt - 1))
        write_json(part / RECORD, found)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    return found


def source_of(uri: str) -> str:
    """Identity of an address, which itself may hold a signature and is not written into results."""
    return hashlib.sha256(uri.encode()).hexdigest()[:32]


def _same(file: Path, record: dict[str, Any], wanted: str | None) -> bool:
    """Whether a copy that an interrupted job left is as it was fetched, and what the sheet wants."""
    if not file.exists() or size_of(file) != record["bytes"]:
        return False
    if record["sha256"] is None:
        return wanted is None
    return wanted in (None, record["sha256"]) and file_sha256(file) == record["sha256"]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _checked(file: Path, uri: str, wanted: str | None) -> dict[str, Any]:
    """What was fetched, after comparing it with the sheet's checksum."""
    if file.is_dir():
        if wanted:
            raise Refused("unsupported", f"{shown(uri)} is a folder, which has no sha256", "Leave the cell empty.")
        found = None
    else:
        found = file_sha256(file)
        if wanted and found != wanted:
            raise SlideFailure("wrong_checksum", f"{shown(uri)} has sha256 {found}, and the sheet says {wanted}")
    size = size_of(file)
    return {"uri": shown(uri), "source": source_of(uri), "bytes": size, "sha256": found, "checked": bool(wanted)}


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Two jobs on one rack (a driver that was killed and started again) fetch one after the other."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(uri: str, file: Path, options: dict[str, Any], checked: bool) -> str | None:
    """Fetch without any check (`checked`: its checksum will be looked at); returns the server's stamp."""
    if urlsplit(uri).scheme.lower() in ("http", "https"):
        return download(uri, file, provider_of(uri, file.parent).settings, options, checked=checked)
    shutil.rmtree(file.parent, ignore_errors=True)
    with _of_the_plugin(uri):
        stored = _stored(uri, file)
        if not stored.exists():
            raise Refused("missing_file", f"there is no {shown(uri)}", "Check the path column of the sheet.")
        told = _stamp(stored)
        _check_names(stored, uri)
        _check_size(stored, uri, options)
        stored.retrieve_object()
        if file.suffix.lower() == ".mrxs":  # its pixels are in the folder of its name
            pixels = _stored(uri[: -len(".mrxs")], file.with_suffix(""))
            _check_names(pixels, uri)
            _check_size(pixels, uri, options)
            pixels.retrieve_object()
    return told


def _stored(uri: str, file: Path) -> Any:
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = provider_of(uri, file.parent).object(uri.rstrip("/"))
    stored.set_local_path(file)
    return stored


def _stamp(stored: Any) -> str:
    return f"{stored.size()}|{stored.mtime()}"


@contextmanager
def _of_the_plugin(uri: str) -> Iterator[None]:
    """Whatever a plugin raises is this slide's failure, but for what the local disk says."""
    try:
        yield
    except (SlideFailure, RunError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        answer = getattr(error, "response", None)
        code = (answer.get("ResponseMetadata") or {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0
        final = (400 <= code < 500 and code not in (408, 429)) or "Credentials" in type(error).__name__
        kind = Refused if final else SlideFailure
        raise kind("unreachable", f"{shown(uri)}: {type(error).__name__}: {error}") from error


def _check_size(stored: Any, uri: str, options: dict[str, Any]) -> None:
    most = options.get("max_gigabytes", 100)
    if stored.size() > 1e9 * most:
        hint = "If slides are as large as that, raise remote.max_gigabytes."
        raise Refused("unreachable", f"{shown(uri)} is larger than {most:g} GB", hint)


def _check_names(stored: Any, uri: str) -> None:
    """The objects of a folder become files: none may lie outside of it. (The plugin joins names as they are.)"""
    if not getattr(stored, "is_dir", lambda: False)():
        return
    for item in stored.get_subkeys():
        if any(step in ("", ".", "..") for step in item.key[len(stored.key) + 1 :].split("/")):
            raise Refused("unsupported", f"{shown(uri)} holds an object with the name {item.key!r}")


def get_slide(
    row: dict[str, str], results: Path, folder: Path, options: dict[str, Any], remedy: str = ""
) -> dict[str, Any]:
    """What the fetching stage does for one slide of the sheet (slide_id, path, sha256) into the `folder` of its rack.

    A slide that was screened before and is still the same is only noted (`postponed`): whoever opens it fetches it.
    """
    slide_id, uri, wanted = row["slide_id"], row["path"], row["sha256"] or None
    slide = read_json_if_whole(results / "slides" / slide_id / "slide.json") or {}
    known = slide.get("remote") if slide.get("status") == "ok" else None
    if known and is_unchanged(uri, wanted, known, options):
        postpone(slide_id, uri, wanted, folder, options)
        known |= {"uri": shown(uri), "source": source_of(uri)}
        return {"fingerprint": fingerprint("fetch", **known), "reused": True, "remote": {**known, "postponed": True}}
    found = fetch_slide(slide_id, uri, wanted, folder, options, remedy)
    return {"fingerprint": fingerprint("fetch", **found), "remote": found}


def fetch_row(row: dict[str, str], folder: Path, options: dict[str, Any]) -> Path:
    """Fetch a slide of the sheet (slide_id, path, sha256) into `folder`; returns its path there."""
    fetch_slide(row["slide_id"], row["path"], row["sha256"] or None, folder, options)
    return Path(local_copy(folder, row["slide_id"], row["path"]))


# -- slides that are fetched only when somebody opens them -------------------------------------------------------------


def is_unchanged(uri: str, wanted: str | None, known: dict[str, Any] | None, options: dict[str, Any]) -> bool:
    """Whether a slide that was processed before is still the same, as far as the sheet and the server tell."""
    if not known:
        return False
    if wanted:
        return wanted == known["sha256"]  # whatever its address (a new signature) is now
    if known["source"] != source_of(uri):
        return False
    if urlsplit(uri).scheme.lower() in ("http", "https"):
        now = stamp(uri, settings_of(plugin_of(urlsplit(uri).scheme.lower())), options)
    else:
        try:
            with tempfile.TemporaryDirectory() as nowhere, _of_the_plugin(uri):
                now = _stamp(_stored(uri, Path(nowhere) / "slide"))
        except SlideFailure:
            now = None
    return now in (None, known["stamp"])


def postpone(slide_id: str, uri: str, wanted: str | None, folder: Path, options: dict[str, Any]) -> None:
    """Note how to fetch a slide, for `arrive` to do it when the slide is opened."""
    later = {"slide_id": slide_id, "uri": uri, "wanted": wanted, "options": options}
    write_json(folder / f"{slide_id}+later.json", later)


def arrive(path: str | Path) -> None:
    """Fetch the slide at `path` if it is one that was postponed; otherwise do nothing."""
    path = Path(path).absolute()  # a bare name has no parent
    if os.path.lexists(path):
        return
    later = read_json_if_whole(path.parent.with_name(f"{path.parent.name}+later.json"))
    if later:
        fetch_slide(later["slide_id"], later["uri"], later["wanted"], path.parent.parent, later["options"])
