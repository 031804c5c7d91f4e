"""Whom a request goes to, and with what: logins for the hosts that they are for, redirects that stay outside."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from slidemake.core.addresses import shown
from slidemake.core.failures import SlideFailure

REDIRECTS = 10


@dataclass(frozen=True)
class Access:
    """The login (of requests, or None) and the hosts that get it, the longest silence (s), the most bytes of a file."""

    auth: Any
    redirects: bool
    login_hosts: frozenset[str]
    private_redirects: bool
    timeout: float
    most: float

    @classmethod
    def of(cls, settings: Any, options: Mapping[str, Any]) -> Access:
        """From the storage plugin's settings and the section `remote` of the configuration."""
        return cls(
            auth=settings.auth,
            redirects=settings.allow_redirects is not False,
            login_hosts=frozenset(host.lower() for host in options.get("login_hosts", ())),
            private_redirects=bool(options.get("private_redirects", False)),
            timeout=float(options["timeout"]),
            most=1e9 * float(options.get("max_gigabytes", 100)),
        )

    def login_for(self, uri: str) -> Any:
        """The login where its host was named for it and nobody can listen: https, or this very machine."""
        parts = urlsplit(uri)
        host = (parts.hostname or "").lower()
        safe = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))
        named = {host, f"{host}:{parts.port}"} & self.login_hosts
        return self.auth if named and safe else None


def ask(method: str, uri: str, access: Access, headers: Mapping[str, str | bytes] | None = None) -> Any:
    """The answer (of requests, streamed) behind all redirects. Raises what requests raises, and SlideFailure
    unreachable for a redirect that must not be followed.
    """
    import requests

    with requests.Session() as session:
        session.trust_env = True  # proxies
        at = uri
        for _ in range(REDIRECTS):
            login = access.login_for(at) or _nobody
            answer = session.request(
                method,
                at,
                headers=dict(headers or {}),
                stream=True,
                auth=login,
                allow_redirects=False,
                timeout=access.timeout,
            )
            where = answer.headers.get("Location")
            if not answer.is_redirect or not where or not access.redirects:
                return answer
            answer.close()
            following = urljoin(at, where)
            _check_redirect(uri, at, following, access)
            at = following
    raise Refused("unreachable", f"{shown(uri)}: more than {REDIRECTS} redirects")


@contextmanager
def answered(uri: str, access: Access, headers: Mapping[str, str | bytes]) -> Iterator[Any]:
    """The answer to GET, closed at the end."""
    answer = ask("GET", uri, access, headers)
    try:
        yield answer
    finally:
        answer.close()


def _nobody(request: Any) -> Any:
    """No login: with None, requests would look for one in ~/.netrc and in the address."""
    return request


def _check_redirect(uri: str, before: str, after: str, access: Access) -> None:
    parts = urlsplit(after)
    if parts.scheme not in ("http", "https"):
        raise Refused(
            "unreachable", f"{shown(uri)}: the server redirects to {parts.scheme[:20]}:, which is not followed"
        )
    old, new = urlsplit(before).hostname or "", parts.hostname or ""
    if access.private_redirects or old.lower() == new.lower() or not _is_private(new):
        return
    raise Refused(
        "unreachable",
        f"{shown(uri)}: the server redirects to {shown(after)}, an address of your own network",
        "If that is meant, set remote.private_redirects: true, or write the address itself into the sheet.",
    )


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except OSError:  # nobody is reached by this name from here
        return []
    return [ipaddress.ip_address(text) for text in found]


def _is_private(host: str) -> bool:
    return any(not (getattr(address, "ipv4_mapped", None) or address).is_global for address in _addresses(host))


def _is_loopback(host: str) -> bool:
    found = _addresses(host)
    return bool(found) and all(address.is_loopback for address in found)


class Refused(SlideFailure):
    """A failure that another attempt would not change."""
