"""A file by http(s): what was received before a connection dropped is kept, and the rest is asked for.

Snakemake's plugin writes whatever the server sends, error pages too, waits for ever where nothing comes, and begins
anew after every drop. Its settings (`auth`, `allow_redirects`) are used here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slidemake.failures import SlideFailure
from slidemake.provenance import read_json_if_whole, write_json
from slidemake.remote import Refused, shown

BLOCK = 1 << 16  # a block that does not come whole is lost
ACCESS = "The server wants a login: SNAKEMAKE_STORAGE_HTTP_AUTH=HTTPBasicAuth=USER,PASSWORD in the environment."


def download(uri: str, file: Path, settings: Any, timeout: float) -> str:
    """Fetch `uri` into `file`, going on where an earlier attempt stopped if the server still has the same file.

    timeout: s without a byte after which the connection is given up. Returns its `stamp`. Raises SlideFailure
    missing_file (404, 410) or unreachable (anything else but the file, whole); OSError of the local disk.
    """
    import requests

    file.parent.mkdir(parents=True, exist_ok=True)
    have, known = _kept(file)
    headers: dict[str, str | bytes] = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    try:
        with requests.get(
            uri,
            headers=headers,
            stream=True,
            auth=settings.auth,
            allow_redirects=settings.allow_redirects is not False,
            timeout=timeout,
        ) as answer:
            start, total = _expected(answer, uri, have)
            size = str(total) if total is not None else ""
            told = "|".join([size, *(answer.headers.get(name, "") for name in ("ETag", "Last-Modified"))])
            write_json(_notes(file), {"validator": _validator(answer), "total": total})
            with open(file, "ab" if start else "wb") as out:
                for block in answer.iter_content(BLOCK):
                    out.write(block)
    except requests.RequestException as error:
        raise SlideFailure("unreachable", f"{shown(uri)}: {_reason(error)}") from error
    came = file.stat().st_size
    if total is not None and came != total:
        raise SlideFailure("unreachable", f"{shown(uri)}: {came} of {total} bytes came")
    _notes(file).unlink()
    return told


def _notes(file: Path) -> Path:
    return file.with_name(file.name + "+notes.json")


def _kept(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of an earlier attempt that may be gone on with, and what is known of them."""
    known = read_json_if_whole(_notes(file)) or {}
    if not known.get("validator") or not file.exists():
        return 0, {}
    size = file.stat().st_size
    return (size, known) if known["total"] is None or size < known["total"] else (0, {})


def _validator(answer: Any) -> str | None:
    """What tells whether a file on the server is still the same; a weak ETag does not."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _expected(answer: Any, uri: str, have: int) -> tuple[int, int | None]:
    """First byte of the answer, and the size of the whole file (None: not told)."""
    code = answer.status_code
    if code in (404, 410):
        hint = "Check the path column of the sheet."
        raise SlideFailure("missing_file", f"there is no {shown(uri)} (HTTP {code})", hint)
    if code in (401, 403):
        raise Refused("unreachable", f"{shown(uri)}: access is refused (HTTP {code})", ACCESS)
    if code == 206 and have:
        place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
        if place is None or int(place[1]) != have:
            raise SlideFailure("unreachable", f"{shown(uri)}: the server sent another part than it was asked for")
        return have, None if place[3] == "*" else int(place[3])
    if code != 200:
        raise SlideFailure("unreachable", f"{shown(uri)}: HTTP {code} {answer.reason}")
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _reason(error: BaseException) -> str:
    """What went wrong, without the address, which may hold a signature: kinds of errors, and the system's word."""
    chain = [error]
    while chain[-1].__context__ is not None and len(chain) < 10:
        chain.append(chain[-1].__context__)
    words = [e.strerror for e in chain if isinstance(e, OSError) and isinstance(e.strerror, str)]
    return ": ".join([type(error).__name__, *words[-1:]])


def stamp(uri: str, settings: Any, timeout: float) -> str | None:
    """What changes when the file on the server does (size, ETag, date); None where it cannot be asked."""
    import requests

    try:
        answer = requests.head(
            uri, auth=settings.auth, allow_redirects=settings.allow_redirects is not False, timeout=timeout
        )
    except requests.RequestException:
        return None
    if answer.status_code != 200:
        return None
    return "|".join(answer.headers.get(name, "") for name in ("Content-Length", "ETag", "Last-Modified"))
