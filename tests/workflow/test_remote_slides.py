"""Cohorts whose slides are at addresses: fetched rack by rack, checked, dropped, and fetched again only when needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from snakemake_run import ENCODER, Project, embedding
from storage_servers import http_site, put, s3_site

pytestmark = pytest.mark.workflow
LOOPBACK = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def at_addresses(rows: list[dict[str, str]], address: Callable[[str], str]) -> list[dict[str, str]]:
    """Rows of a sheet with addresses and checksums in place of paths."""
    found = []
    for row in rows:
        path = Path(row["path"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append({**row, "path": address(path.name), "sha256": digest})
    return found


def on_disk(project: Project) -> list[str]:
    return sorted(path.name for path in (project.results / "fetched").glob("r0*") if path.is_dir())


def test_slides_by_http(new_project: Callable[..., Project], finished: Project, sheet_rows: list[dict[str, str]]):
    """Two racks, one on the disk at a time; a slide that is not there, and one that is not what the sheet says."""
    rows = [row for row in sheet_rows if row["slide_id"].endswith("-A")][:6]
    project = new_project(rack_size=3, remote={"racks_on_disk": 1, "attempts": 2})
    missing, wrong = rows[1]["slide_id"], rows[4]["slide_id"]
    with http_site({f"/{Path(row['path']).name}": Path(row["path"]).read_bytes() for row in rows}) as site:
        sheet = at_addresses(rows, lambda name: f"{site.address}/{name}")
        lost = site.files.pop(f"/{missing}.tiff")
        good, sheet[4]["sha256"] = sheet[4]["sha256"], "0" * 64
        project.write_sheet(sheet)
        site.drops[f"/{rows[0]['slide_id']}.tiff"] = 1
        racks_seen: list[int] = []
        site.watch = lambda: racks_seen.append(len(on_disk(project)))

        assert project.planned("cohort")["fetch_slides"] == 2
        assert not site.asked  # a plan asks nothing of the network
        project.succeed("cohort", **LOOPBACK)
        failures = {row["slide_id"]: row for row in project.table("cohort/failures.csv")}
        assert {slide: row["code"] for slide, row in failures.items()} == {
            missing: "missing_file",
            wrong: "wrong_checksum",
        }
        assert all(row["stage"] == "fetch" and "next run tries again" in row["hint"] for row in failures.values())
        assert max(racks_seen) <= 1
        assert on_disk(project) == []
        assert not list(project.results.glob("fetched/*+coming"))
        for row in rows:
            if row["slide_id"] not in failures:
                features, coords, _ = embedding(project, row["slide_id"])
                wanted, places, _ = embedding(finished, row["slide_id"])
                np.testing.assert_array_equal(coords, places)
                np.testing.assert_array_equal(features, wanted)

        asked = site.asked.copy()
        again = project.planned("cohort")  # what was missing may be there now
        assert again["fetch_slides"] >= 1
        project.configure(remote={"racks_on_disk": 4, "attempts": 3, "connections": 1})
        assert project.planned("cohort") == again
        project.configure(tiling={"min_tissue": 0.6})
        assert project.planned("cohort")["fetch_slides"] == 2
        project.configure(tiling={"min_tissue": 0.5})
        assert site.asked == asked

        site.files[f"/{missing}.tiff"], sheet[4]["sha256"] = lost, good
        project.write_sheet(sheet)
        project.succeed("cohort", **LOOPBACK)
        assert project.table("cohort/failures.csv") == []
        new = site.asked - asked
        assert {path for method, path in new if method == "GET"} == {f"/{missing}.tiff", f"/{wrong}.tiff"}
        assert on_disk(project) == []

        # other bytes at an address whose row says nothing of them: seen when the rack is looked at, here for a new row
        for row in sheet:
            row["sha256"] = ""
        project.write_sheet(sheet)
        project.succeed("cohort", **LOOPBACK)
        before = {record["slide_id"]: record["fingerprint"] for record in project.manifest("embed", ENCODER)}
        replaced = sheet[3]["slide_id"]
        site.files[f"/{replaced}.tiff"] = Path(sheet_rows[-1]["path"]).read_bytes() + b"another scan"
        project.write_sheet([*sheet, {**sheet[0], "slide_id": "new", "path": f"{sheet[0]['path']}?2"}])
        project.configure(screening={"duplicates": "warn"})
        (project.results / "manifests" / "screen" / "r00001.json").unlink()
        project.succeed("cohort", **LOOPBACK)
        after = {record["slide_id"]: record["fingerprint"] for record in project.manifest("embed", ENCODER)}
        assert {slide for slide, mark in before.items() if after[slide] != mark} == {replaced}
        assert set(after) - set(before) == {"new"}


def test_slides_by_s3_without_stored_pixels(new_project: Callable[..., Project], sheet_rows: list[dict[str, str]]):
    """`store: coords` needs the slides while embedding, and again for the galleries of tiles, up to the report."""
    project = new_project(tiling={"store": "coords"}, rack_size=5, remote={"racks_on_disk": 1, "attempts": 2})
    rows = [row for row in sheet_rows if row["slide_id"].endswith("-A")]
    with s3_site() as (client, env):
        for row in rows:
            put(client, "slides", f"cohort/{Path(row['path']).name}", Path(row["path"]))
        project.write_sheet(at_addresses(rows, lambda name: f"s3://slides/cohort/{name}"))
        project.succeed(**env)
        assert project.table("cohort/failures.csv") == []
        explained = project.manifest("explain", "tumour", "abmil")
        assert [record["status"] for record in explained] == ["ok"] * len(rows)
        for row in rows:
            folder = project.results / "explain" / "tumour" / "abmil" / row["slide_id"]
            assert (folder / "top.jpg").exists()
            assert (folder / "heatmap.png").exists()
        assert [path.name for path in (project.results / "fetched").iterdir() if path.is_dir()] == ["released"]
        assert project.planned() == {}
