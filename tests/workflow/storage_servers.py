"""Servers on the loopback that slides are fetched from: one speaks S3, the other HTTP, with the faults of real ones."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Site:
    """What an HTTP server gives, how it fails, and what it was asked for.

    files: by path. drops: path -> how many answers break off in the middle. ranges: whether it sends parts.
    errors: path -> status codes of the next answers. asked: (method, path) and how often; parts: first bytes that were
    asked for.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    parts: list[int] = field(default_factory=list)
    address: str = ""
    watch: Callable[[], None] = lambda: None  # called at every GET

    def gets(self) -> int:
        return sum(count for (method, _), count in self.asked.items() if method == "GET")


@contextmanager
def http_site(files: dict[str, bytes], port: int = 0) -> Iterator[Site]:
    """An HTTP server for `files`; port 0: any that is free."""
    site = Site(dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer("HEAD")

        def do_GET(self) -> None:
            self.answer("GET")

        def answer(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            site.asked[method, path] += 1
            if method == "GET":
                site.watch()
            if method == "GET" and site.errors.get(path):
                return self.say(site.errors[path].pop(0), b"an error page, and no slide")
            if path not in site.files:
                return self.say(404, b"<html>not found</html>")
            body = site.files[path]
            tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = 0
            if wanted and site.ranges and self.headers.get("If-Range") == tag:
                start = int(wanted[1])
                site.parts.append(start)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("ETag", tag)
            self.end_headers()
            if method == "HEAD":
                return None
            if site.drops.get(path, 0):
                site.drops[path] -= 1
                self.wfile.write(body[start : start + (len(body) - start) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return None
            self.wfile.write(body[start:])
            return None

        def say(self, code: int, page: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_site() -> Iterator[tuple[Any, dict[str, str]]]:
    """An S3 server: its boto3 client, and the environment that credentials and endpoint come from."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "SNAKEMAKE_STORAGE_S3_RETRIES": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    client = boto3.client(
        "s3",
        endpoint_url=env["SNAKEMAKE_STORAGE_S3_ENDPOINT_URL"],
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    )
    try:
        yield client, env
    finally:
        server.stop()


def put(client: Any, bucket: str, key: str, content: bytes | Path) -> None:
    """Store an object, in a bucket that is made for it."""
    if bucket not in {b["Name"] for b in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key=key, Body=content if isinstance(content, bytes) else content.read_bytes())
