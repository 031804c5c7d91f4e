"""A file by http(s): what was received before a connection dropped is kept, and the rest is asked for.

Snakemake's plugin writes whatever the server sends, error pages too, waits for ever where nothing comes, and begins
anew after every drop. Its settings (`auth`, `allow_redirects`) are used here. Of servers nothing is taken on trust: a
login goes only to hosts that were named for it, bytes are counted as they come and as they are unpacked, a transfer has
a lowest speed, and a redirect leads to no address of the own network (`remote_access`).
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slidemake.core.addresses import shown
from slidemake.core.failures import SlideFailure
from slidemake.core.files import read_json_if_whole, write_json
from slidemake.slides.remote_access import Access, Refused, answered, ask

BLOCK = 1 << 16
LOWEST = 1000  # bytes per s; over each span of `timeout` s less than that is given up
ACCESS = (
    "The server wants a login: SNAKEMAKE_STORAGE_HTTP_AUTH=HTTPBasicAuth=USER,PASSWORD in the environment, and its "
    "host under remote.login_hosts (it is sent over https only)."
)
NO_LENGTH = "Write the file's sha256 into the sheet, or fetch it yourself: without either, a part looks like the whole."


def download(uri: str, file: Path, settings: Any, options: dict[str, Any], *, checked: bool = False) -> str:
    """Fetch `uri` into `file`, going on where an earlier attempt stopped if the server still has the same file.

    options: of `remote`: `timeout` (s without a byte after which the connection is given up), `max_gigabytes` (of a
    file), `login_hosts`, `private_redirects`. checked: the bytes will be compared with a checksum, so that a server
    need not say how many there are. Returns its `stamp`. Raises SlideFailure missing_file (404, 410) or unreachable
    (anything else but the file, whole); OSError of the local disk.
    """
    import requests
    import urllib3

    access = Access.of(settings, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    have, known = _kept(file)
    headers: dict[str, str | bytes] = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    try:
        with answered(uri, access, headers) as answer:
            start, total = _expected(answer, uri, have)
            coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
            if total is None and not checked and not _ends_by_itself(answer):
                total = _told_length(uri, access)
            if total is not None and total > access.most:
                raise _too_large(uri, access)
            size = str(total) if total is not None else ""
            told = "|".join([size, *(answer.headers.get(name, "") for name in ("ETag", "Last-Modified"))])
            # what was unpacked cannot be gone on with
            write_json(
                _notes(file), {"validator": _validator(answer) if coding == "identity" else None, "total": total}
            )
            came = _receive(answer, uri, file, start, coding, access)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise SlideFailure("unreachable", f"{shown(uri)}: {_reason(error)}") from error
    if total is not None and came != total:
        raise SlideFailure("unreachable", f"{shown(uri)}: {came} of {total} bytes came")
    _notes(file).unlink()
    return told


def _receive(answer: Any, uri: str, file: Path, start: int, coding: str, access: Access) -> int:
    """Write what comes, unpacked, behind the first `start` bytes. Returns how many bytes came, with those."""
    if coding not in ("identity", "", "gzip", "x-gzip"):
        raise SlideFailure(
            "unreachable", f"{shown(uri)}: it was sent packed as {coding[:40]!r}, which was not asked for"
        )
    unpack = None if coding in ("identity", "") else zlib.decompressobj(wbits=31)
    came = written = start
    with open(file, "ab" if start else "wb") as out:
        for block in _blocks(answer, uri, access):
            came += len(block)
            while block:
                part, block = (block, b"") if unpack is None else _unpacked(unpack, block, uri)
                written += len(part)
                if max(came, written) > access.most:
                    raise _too_large(uri, access)
                out.write(part)
    if unpack is not None and not unpack.eof:
        raise SlideFailure("unreachable", f"{shown(uri)}: the packed file ended too early")
    return came


def _unpacked(unpack: Any, block: bytes, uri: str) -> tuple[bytes, bytes]:
    """The next part, of bounded size, and what of the block is left."""
    try:
        part = unpack.decompress(block, 1 << 20)
    except zlib.error as error:
        raise SlideFailure("unreachable", f"{shown(uri)}: what was sent as gzip is none") from error
    return part, unpack.unconsumed_tail


def _blocks(answer: Any, uri: str, access: Access) -> Iterator[bytes]:
    """What comes, as it comes: a read that waits for a full block would not see how slow a server is."""
    since, came = time.monotonic(), 0
    while block := answer.raw.read1(BLOCK, decode_content=False):
        yield block
        came += len(block)
        if (span := time.monotonic() - since) >= access.timeout:
            if came < LOWEST * span:
                raise SlideFailure(
                    "unreachable",
                    f"{shown(uri)}: {came} bytes came in {span:.0f} s, less than {LOWEST} bytes per second",
                )
            since, came = time.monotonic(), 0


def _too_large(uri: str, access: Access) -> SlideFailure:
    hint = "If slides are as large as that, raise remote.max_gigabytes."
    return Refused("unreachable", f"{shown(uri)} is larger than {access.most / 1e9:g} GB", hint)


def _ends_by_itself(answer: Any) -> bool:
    """Whether the form of the answer tells where it ends, also without its length."""
    return "chunked" in answer.headers.get("Transfer-Encoding", "").lower()


def _told_length(uri: str, access: Access) -> int:
    """The length as HEAD tells it, of an answer to GET that has none. Such a server's early end looks like the end."""
    answer = ask("HEAD", uri, access)
    length = answer.headers.get("Content-Length", "")
    answer.close()
    if answer.status_code != 200 or not length.isdecimal():
        raise Refused("unreachable", f"{shown(uri)}: the server does not say how long the file is", NO_LENGTH)
    return int(length)


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
    """First byte of the answer, and the size of the whole file as it is sent (None: not told)."""
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
    length = answer.headers.get("Content-Length")
    if length is not None and not length.isdecimal():
        raise SlideFailure("unreachable", f"{shown(uri)}: the server says that the file has {length[:40]} bytes")
    return 0, None if length is None else int(length)


def _reason(error: BaseException) -> str:
    """What went wrong, without the address, which may hold a signature: kinds of errors, and the system's word."""
    chain = [error]
    while chain[-1].__context__ is not None and len(chain) < 10:
        chain.append(chain[-1].__context__)
    words = [e.strerror for e in chain if isinstance(e, OSError) and isinstance(e.strerror, str)]
    return ": ".join([type(error).__name__, *words[-1:]])


def stamp(uri: str, settings: Any, options: dict[str, Any]) -> str | None:
    """What changes when the file on the server does (size, ETag, date); None where it cannot be asked."""
    import requests

    try:
        answer = ask("HEAD", uri, Access.of(settings, options))
    except (requests.RequestException, SlideFailure):
        return None
    answer.close()
    if answer.status_code != 200:
        return None
    return "|".join(answer.headers.get(name, "") for name in ("Content-Length", "ETag", "Last-Modified"))
