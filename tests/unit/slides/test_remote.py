"""Slides at an address: fetched whole or not at all, from real servers on the loopback that fail as real ones do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from slidemake.core.addresses import local_copy, local_name, shown
from slidemake.core.currency import PASSING
from slidemake.core.failures import RunError, SlideFailure
from slidemake.slides import remote
from slidemake.slides.remote import arrive, check_addresses, fetch_slide, get_slide
from storage_servers import http_site, put, s3_site

OPTIONS = {"attempts": 3, "timeout": 10, "connections": 2}
SLIDE = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(SLIDE).hexdigest()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def site():
    with http_site({"/slides/a.svs": SLIDE}) as found:
        yield found


@pytest.fixture(scope="module")
def s3():
    with s3_site() as (client, env):
        before = dict(os.environ)
        os.environ.update(env)
        yield client
        os.environ.clear()
        os.environ.update(before)


def fetched(folder: Path, uri: str, wanted: str | None = None) -> bytes:
    record = fetch_slide("a", uri, wanted, folder, OPTIONS)
    content = Path(local_copy(folder, "a", uri)).read_bytes()
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["bytes"] == len(content)
    return content


def refused(folder: Path, uri: str, wanted: str | None = None) -> SlideFailure:
    with pytest.raises(SlideFailure) as caught:
        fetch_slide("a", uri, wanted, folder, OPTIONS, "REMEDY")
    assert not (folder / "a").exists()
    assert not (folder / "a+part").exists()
    assert caught.value.hint.endswith("REMEDY") == (caught.value.code in PASSING)  # where the next run tries again
    return caught.value


# -- https -----------------------------------------------------------------------------------------------------------


def test_http(site, tmp_path):
    assert fetched(tmp_path, f"{site.address}/slides/a.svs") == SLIDE
    assert fetched(tmp_path / "2", f"{site.address}/slides/a.svs", SHA) == SLIDE


def test_dropped_connections_are_taken_up_where_they_broke(site, tmp_path):
    site.drops["/slides/a.svs"] = 2
    assert fetched(tmp_path, f"{site.address}/slides/a.svs", SHA) == SLIDE
    assert site.parts == [len(SLIDE) // 2, len(SLIDE) * 3 // 4]


def test_a_server_without_ranges_is_asked_for_all_again(site, tmp_path):
    site.drops["/slides/a.svs"], site.ranges = 2, False
    assert fetched(tmp_path, f"{site.address}/slides/a.svs", SHA) == SLIDE
    assert site.parts == []


def test_a_file_that_changes_between_attempts_is_not_glued_together(site, tmp_path, monkeypatch):
    other = SLIDE[::-1]
    site.drops["/slides/a.svs"] = 1
    monkeypatch.setattr(remote.time, "sleep", lambda s: site.files.update({"/slides/a.svs": other}))
    assert fetched(tmp_path, f"{site.address}/slides/a.svs") == other


def test_a_connection_that_always_drops_is_that_slides_failure(site, tmp_path):
    site.drops["/slides/a.svs"] = 99
    failure = refused(tmp_path, f"{site.address}/slides/a.svs")
    assert failure.code == "unreachable"
    assert "3 attempts" in failure.message
    assert site.gets() == OPTIONS["attempts"]


def test_error_pages_are_no_slides(site, tmp_path):
    site.errors["/slides/a.svs"] = [503, 500]
    assert fetched(tmp_path, f"{site.address}/slides/a.svs") == SLIDE
    site.errors["/slides/a.svs"] = [403]
    failure = refused(tmp_path / "2", f"{site.address}/slides/a.svs")
    assert (failure.code, site.asked["GET", "/slides/a.svs"]) == ("unreachable", 4)  # a refusal is not asked again
    assert "SNAKEMAKE_STORAGE_HTTP_AUTH" in failure.hint
    failure = refused(tmp_path / "3", f"{site.address}/slides/b.svs")
    assert (failure.code, site.asked["GET", "/slides/b.svs"]) == ("missing_file", 1)


def test_wrong_checksum(site, tmp_path):
    failure = refused(tmp_path, f"{site.address}/slides/a.svs", "0" * 64)
    assert failure.code == "wrong_checksum"
    assert SHA in failure.message
    assert site.gets() == 2  # the same twice: it is not the line


def test_no_server(tmp_path):
    failure = refused(tmp_path, "http://127.0.0.1:9/a.svs?signature=SECRET")
    assert failure.code == "unreachable"
    assert "SECRET" not in failure.message
    assert "Connection refused" in failure.message


def test_what_an_interrupted_job_fetched_is_not_fetched_again(site, tmp_path):
    uri = f"{site.address}/slides/a.svs"
    fetched(tmp_path, uri, SHA)
    fetched(tmp_path, uri, SHA)
    assert site.gets() == 1
    Path(local_copy(tmp_path, "a", uri)).write_bytes(SLIDE[:-1] + b"x")  # the disk lost power
    assert fetched(tmp_path, uri, SHA) == SLIDE
    assert site.gets() == 2


def test_login_comes_from_the_environment(site, tmp_path, monkeypatch):
    from requests.auth import HTTPBasicAuth

    monkeypatch.setenv("SNAKEMAKE_STORAGE_HTTP_AUTH", "HTTPBasicAuth=me,secret")
    settings = remote.settings_of(remote.plugin_of("https"))
    assert settings.auth == HTTPBasicAuth("me", "secret")
    assert settings.allow_redirects is True


# -- s3 --------------------------------------------------------------------------------------------------------------


def test_s3(s3, tmp_path):
    put(s3, "slides", "deep/a.svs", SLIDE)
    assert fetched(tmp_path, "s3://slides/deep/a.svs", SHA) == SLIDE


def test_s3_folder(s3, tmp_path):
    """A DICOM slide of several files; and an MRXS with the folder of its pixels."""
    for name in ("1.dcm", "sub/2.dcm"):
        put(s3, "slides", f"dicom/{name}", name.encode())
    put(s3, "slides", "b.mrxs", b"head")
    put(s3, "slides", "b/Data0001.dat", b"pixels")
    record = fetch_slide("a", "s3://slides/dicom/", None, tmp_path, OPTIONS)
    assert record["sha256"] is None
    assert (tmp_path / "a" / "dicom" / "sub" / "2.dcm").read_bytes() == b"sub/2.dcm"
    fetch_slide("b", "s3://slides/b.mrxs", None, tmp_path, OPTIONS)
    assert (tmp_path / "b" / "b.mrxs").read_bytes() == b"head"
    assert (tmp_path / "b" / "b" / "Data0001.dat").read_bytes() == b"pixels"
    assert refused(tmp_path / "2", "s3://slides/dicom/", SHA).code == "unsupported"


@pytest.mark.parametrize("uri", ["s3://slides/none.svs", "s3://no-such-bucket/a.svs"])
def test_s3_missing(s3, tmp_path, uri):
    put(s3, "slides", "deep/a.svs", SLIDE)
    assert refused(tmp_path, uri).code == "missing_file"


def test_s3_wrong_checksum(s3, tmp_path):
    put(s3, "slides", "deep/a.svs", SLIDE)
    assert refused(tmp_path, "s3://slides/deep/a.svs", "0" * 64).code == "wrong_checksum"


def test_s3_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_RETRIES", "1")
    assert refused(tmp_path, "s3://slides/a.svs").code == "unreachable"


def test_objects_cannot_lead_out_of_the_folder(s3, tmp_path):
    """Keys of S3 may hold `..`, and the plugin joins them to a path as they are."""
    put(s3, "hostile", "slide/1.dcm", b"1")
    put(s3, "hostile", "slide/../../../evil", b"evil")
    failure = refused(tmp_path / "a" / "b", "s3://hostile/slide")
    assert failure.code == "unsupported"
    assert not list(tmp_path.rglob("evil"))


# -- known slides ----------------------------------------------------------------------------------------------------


def test_a_slide_that_is_known_is_fetched_only_when_it_is_opened(site, tmp_path):
    from slidemake.core.files import write_json

    row = {"slide_id": "a", "path": f"{site.address}/slides/a.svs", "sha256": ""}
    first = get_slide(row, tmp_path, tmp_path / "r0", OPTIONS)["remote"]
    write_json(tmp_path / "slides" / "a" / "slide.json", {"status": "ok", "remote": first})
    again = get_slide(row, tmp_path, tmp_path / "r1", OPTIONS)
    assert again["reused"]
    assert site.gets() == 1
    path = Path(local_copy(tmp_path / "r1", "a", row["path"]))
    assert not path.exists()
    arrive(path)
    assert path.read_bytes() == SLIDE
    arrive(path)
    assert site.gets() == 2


def test_a_slide_of_known_checksum_is_known_at_another_address(site, tmp_path):
    from slidemake.core.files import write_json

    row = {"slide_id": "a", "path": f"{site.address}/slides/a.svs?signature=1", "sha256": SHA}
    first = get_slide(row, tmp_path, tmp_path / "r0", OPTIONS)["remote"]
    write_json(tmp_path / "slides" / "a" / "slide.json", {"status": "ok", "remote": first})
    again = get_slide({**row, "path": f"{site.address}/slides/a.svs?signature=2"}, tmp_path, tmp_path / "r1", OPTIONS)
    assert again["reused"]
    assert again["remote"]["source"] != first["source"]
    assert sum(site.asked.values()) == 1


def test_a_slide_that_has_changed_at_its_address_is_fetched(site, tmp_path):
    from slidemake.core.files import write_json

    row = {"slide_id": "a", "path": f"{site.address}/slides/a.svs", "sha256": ""}
    first = get_slide(row, tmp_path, tmp_path / "r0", OPTIONS)["remote"]
    write_json(tmp_path / "slides" / "a" / "slide.json", {"status": "ok", "remote": first})
    site.files["/slides/a.svs"] = SLIDE[::-1]
    again = get_slide(row, tmp_path, tmp_path / "r1", OPTIONS)
    assert "reused" not in again
    assert again["remote"]["sha256"] != SHA
    with pytest.raises(SlideFailure, match="the sheet says"):
        get_slide({**row, "sha256": SHA[::-1]}, tmp_path, tmp_path / "r2", OPTIONS)


# -- names and secrets -----------------------------------------------------------------------------------------------


def test_results_never_show_what_an_address_keeps_secret():
    assert shown("https://u:pw@host/a/b.svs?X-Amz-Signature=s#f") == "https://host/a/b.svs"
    assert shown("s3://bucket/a.svs") == "s3://bucket/a.svs"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("https://host/a/b.svs?x=/../c", "b.svs"),
        ("https://host/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("https://host/", "slide"),
        ("s3://bucket/..", "slide"),
        ("s3://bucket/a;rm -rf ~.svs", "a_rm_-rf_.svs"),
        ("s3://bucket/dicom/", "dicom"),
    ],
)
def test_names_of_local_copies_stay_in_their_folder(uri, name):
    assert local_name(uri) == name


def test_an_address_that_nothing_takes_is_told_before_the_run():
    check_addresses(["/data/a.svs", "s3://b/a.svs", "https://h/a.svs", "relative/a.svs"])
    with pytest.raises(RunError, match="snakemake-storage-plugin-gcs"):
        check_addresses(["gs://bucket/a.svs"])
