"""What a server may not do: collect logins, fill the disk, take for ever, pass a part for the whole, lead inside."""

from __future__ import annotations

import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slidemake.core.addresses import local_copy
from slidemake.core.failures import SlideFailure
from slidemake.slides import remote, remote_access, remote_http
from slidemake.slides.remote import fetch_slide

SLIDE = bytes(range(256)) * 1024  # 256 KiB
OPTIONS = {"attempts": 1, "timeout": 20, "connections": 1, "max_gigabytes": 1e-3}


class Server:
    """Answers with whatever bytes a function of (method, headers of the request) yields. `requests`: what was asked."""

    def __init__(self, answer: Callable[[str], Iterable[bytes]]):
        self.answer, self.requests = answer, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            self.requests.append(request.decode())
            try:
                for part in self.answer(request.decode().split()[0]):
                    connection.sendall(part)
            except OSError:
                return  # the other side has had enough

    def uri(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/a.svs"


@contextmanager
def server(answer: Callable[[str], Iterable[bytes]]) -> Iterator[Server]:
    made = Server(answer)
    try:
        yield made
    finally:
        made.listening.close()


def head(*lines: str, version: str = "1.1", status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/{version} {status}", *lines, "", ""]).encode()


def whole(method: str) -> Iterator[bytes]:
    yield head(f"Content-Length: {len(SLIDE)}")
    if method == "GET":
        yield SLIDE


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_HTTP_AUTH", "HTTPBasicAuth=me,secret")


def get(site: Server, folder: Path, wanted: str | None = None, host: str = "127.0.0.1", **options: object) -> bytes:
    uri = site.uri(host)
    fetch_slide("a", uri, wanted, folder, OPTIONS | options)
    return Path(local_copy(folder, "a", uri)).read_bytes()


def refusal(site: Server, folder: Path, **options: object) -> SlideFailure:
    with pytest.raises(SlideFailure) as caught:
        get(site, folder, **options)
    assert not (folder / "a").exists()
    return caught.value


def test_a_login_goes_to_the_hosts_that_it_is_for_and_to_no_other(tmp_path):
    with server(whole) as site:
        assert get(site, tmp_path / "1") == SLIDE
        assert get(site, tmp_path / "2", login_hosts=["images.example.org"]) == SLIDE
        assert not any("Authorization" in request for request in site.requests)
        assert get(site, tmp_path / "3", login_hosts=[f"127.0.0.1:{site.port}"]) == SLIDE
        assert "Authorization: Basic" in site.requests[-1]
        assert get(site, tmp_path / "4", host="localhost", login_hosts=["127.0.0.1"]) == SLIDE
        assert "Authorization" not in site.requests[-1]


@pytest.mark.parametrize(
    ("uri", "sent"),
    [
        ("https://images.example.org/a.svs", True),
        ("https://IMAGES.example.org:443/a.svs", True),
        ("http://images.example.org/a.svs", False),
        ("https://images.example.org.evil.org/a.svs", False),
        ("https://evil.org/images.example.org", False),
        ("https://images.example.org@evil.org/a.svs", False),
    ],
)
def test_logins_are_for_https(uri, sent, monkeypatch):
    monkeypatch.setattr(remote_access, "_addresses", lambda host: [])
    access = remote_access.Access("login", True, frozenset(["images.example.org"]), False, 1, 1)
    assert access.login_for(uri) == ("login" if sent else None)


def test_a_redirect_takes_no_login_along(tmp_path):
    with server(whole) as other:
        there = f"http://localhost:{other.port}/b.svs"
        with server(lambda method: [head(f"Location: {there}", "Content-Length: 0", status="302 Found")]) as site:
            options = {"login_hosts": ["127.0.0.1"], "private_redirects": True}
            assert get(site, tmp_path, **options) == SLIDE
            assert "Authorization" in site.requests[0]
            assert "Authorization" not in other.requests[0]


@pytest.mark.parametrize("there", ["http://localhost/", "http://169.254.169.254/latest/meta-data", "http://[::1]/x"])
def test_a_redirect_into_the_own_network_is_not_followed(tmp_path, there):
    with server(lambda method: [head(f"Location: {there}", "Content-Length: 0", status="302 Found")]) as site:
        failure = refusal(site, tmp_path)
        assert failure.code == "unreachable"
        assert "an address of your own network" in failure.message
        assert "private_redirects" in failure.hint


def test_a_redirect_to_a_file_is_not_followed(tmp_path):
    with server(lambda method: [head("Location: file:///etc/passwd", status="302 Found")]) as site:
        assert "redirects to file:" in refusal(site, tmp_path, private_redirects=True).message


def test_redirects_in_a_circle(tmp_path):
    with server(
        lambda method: [head("Location: /a.svs", "Content-Length: 0", "Connection: close", status="302 Found")]
    ) as site:
        assert "more than 10 redirects" in refusal(site, tmp_path).message


def endless(method: str) -> Iterator[bytes]:
    yield head("Transfer-Encoding: chunked")
    yield from itertools.repeat(b"10000\r\n" + bytes(65536) + b"\r\n")


def packed(content: bytes) -> Callable[[str], Iterator[bytes]]:
    body = gzip.compress(content)

    def answer(method: str) -> Iterator[bytes]:
        yield head(f"Content-Length: {len(body)}", "Content-Encoding: gzip")
        if method == "GET":
            yield body

    return answer


def test_a_body_without_end_is_cut_off(tmp_path):
    with server(endless) as site:
        assert "larger than 0.001 GB" in refusal(site, tmp_path).message


def test_a_length_beyond_the_limit_is_refused_before_it_comes(tmp_path):
    with server(lambda method: [head("Content-Length: 2000000"), bytes(100)]) as site:
        failure = refusal(site, tmp_path)
        assert "larger than 0.001 GB" in failure.message
        assert "max_gigabytes" in failure.hint


def test_bytes_are_counted_as_they_are_unpacked(tmp_path, monkeypatch):
    with server(packed(bytes(50_000_000))) as site:  # 50 kB as it comes
        written = []
        plain = remote_http._unpacked
        monkeypatch.setattr(
            remote_http, "_unpacked", lambda *about: written.append(len((found := plain(*about))[0])) or found
        )
        assert "larger than 0.001 GB" in refusal(site, tmp_path).message
        assert sum(written) < 3e6  # a part more than the limit


def test_a_good_file_that_was_sent_packed(tmp_path):
    with server(packed(SLIDE)) as site:
        assert get(site, tmp_path) == SLIDE


def test_a_packed_file_that_ends_early_is_none(tmp_path):
    body = gzip.compress(SLIDE)[:-100]
    with server(lambda method: [head(f"Content-Length: {len(body)}", "Content-Encoding: gzip"), body]) as site:
        assert "ended too early" in refusal(site, tmp_path).message


def test_an_encoding_that_nobody_asked_for(tmp_path):
    with server(lambda method: [head("Content-Length: 3", "Content-Encoding: br"), b"abc"]) as site:
        assert "'br'" in refusal(site, tmp_path).message


def test_an_early_end_without_a_length_is_no_success(tmp_path):
    """HTTP/1.0: the end of the connection is the end of the file, also when it broke."""
    import hashlib

    with server(lambda method: [head(version="1.0"), SLIDE[:1000] if method == "GET" else b""]) as site:
        failure = refusal(site, tmp_path)
        assert "does not say how long" in failure.message
        assert "sha256" in failure.hint
    with server(lambda method: [head(version="1.0"), SLIDE if method == "GET" else b""]) as site:
        assert get(site, tmp_path / "2", hashlib.sha256(SLIDE).hexdigest()) == SLIDE


def test_the_length_may_be_told_by_head(tmp_path):
    def answer(method: str, part: int | None = None) -> Iterator[bytes]:
        yield head(*([f"Content-Length: {len(SLIDE)}"] if method == "HEAD" else []), version="1.0")
        if method == "GET":
            yield SLIDE[:part]

    with server(answer) as site:
        assert get(site, tmp_path) == SLIDE
    with server(lambda method: answer(method, 1000)) as site:
        assert f"1000 of {len(SLIDE)} bytes came" in refusal(site, tmp_path / "2").message


def test_a_chunked_body_that_breaks_off(tmp_path):
    with server(lambda method: [head("Transfer-Encoding: chunked"), b"10000\r\n" + bytes(100)]) as site:
        assert refusal(site, tmp_path).code == "unreachable"


@pytest.mark.parametrize("length", ["-5", "1e3", "many"])
def test_a_length_that_is_none(tmp_path, length):
    with server(lambda method: [head(f"Content-Length: {length}"), SLIDE]) as site:
        assert refusal(site, tmp_path).code == "unreachable"


def test_a_byte_now_and_then_is_given_up(tmp_path):
    def answer(method: str) -> Iterator[bytes]:
        yield head(f"Content-Length: {len(SLIDE)}")
        for at in range(len(SLIDE)):
            time.sleep(0.05)
            yield SLIDE[at : at + 1]

    with server(answer) as site:
        assert "less than 1000 bytes per second" in refusal(site, tmp_path, timeout=0.5).message
