"""The report as a reader sees it: in a real browser, from a file, without a network."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from browser import CHROMIUM, Browser, Page
from PIL import Image
from slidemake.core.currency import write_record
from slidemake.core.tables import seal_tables
from snakemake_run import Project

pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (apt install chromium)"),
]
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def page(finished: Project, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report alone, in an empty folder: whatever it showed from elsewhere would be missing."""
    alone = tmp_path_factory.mktemp("alone") / "index.html"
    shutil.copy(finished.results / "report" / "index.html", alone)
    return browser.open(alone)


def test_page_asks_for_nothing_and_complains_of_nothing(page: Page):
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert [url.rsplit("/", 1)[1] for url in asked] == ["index.html"]
    assert asked[0].startswith("file://")
    assert page.console == []


def test_page_has_its_sections(page: Page):
    sections = page.value("[...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == ["task-1", "maps-1", "cohort", "failures", "quality", "speed", "timeline", "provenance"]
    links = page.value("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    assert sorted(links) == sorted(sections)
    assert page.value("[...document.querySelectorAll('section')].every(s => s.innerText.length > 50)")


def test_every_picture_is_there(page: Page):
    sizes = page.value(
        "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth))))"
    )
    assert len(sizes) >= 12  # thumbnails, curves, heatmaps, stain
    assert min(sizes) > 10
    assert page.value("[...document.querySelectorAll('#slides img')].length") >= 9


def test_tables_have_slides_failures_and_controls(page: Page):
    assert page.value("document.querySelectorAll('#slides tbody tr').length") == 12
    failures = page.value("document.getElementById('failures').innerText")
    assert all(slide in failures for slide in ("P03-B", "P06-B", "P07-B"))
    assert all(code in failures for code in ("no_mpp", "no_tissue", "truncated"))
    task = page.value("document.getElementById('task-1').innerText")
    assert all(
        words in task.lower().replace("_", " ") for words in ("abmil", "mean pool", "site only", "shuffled label")
    )
    provenance = page.value("document.getElementById('provenance').textContent")
    assert all(words in provenance for words in ("efficientnet_lite0", "torch", "snakemake --cores", "min_tissue"))


def test_filter_of_the_cohort_works(page: Page):
    shown = page.value(
        "(box => { box.value = 'P02'; box.dispatchEvent(new Event('input'));"
        " return [...document.querySelectorAll('#slides tbody tr')].filter(r => !r.hidden).length })"
        "(document.getElementById('filter'))"
    )
    assert shown == 2


def test_page_is_not_blank_and_no_wider_than_the_window(page: Page):
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).astype(float)
    assert picture.shape[1] >= 1000
    assert picture.std() > 10
    assert len(np.unique(picture)) > 50
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth + 1")


def test_nothing_from_a_sheet_is_executed(project: Project, browser: Browser):
    """What users and files say is shown as text: title, site, failure message, task label."""
    project.configure(report={"title": f"Title {EVIL}"})
    quoted = EVIL.replace('"', '""')
    for path, words, evil in (
        ("cohort/slides.csv", "Northfield", f'"{quoted}"'),
        ("cohort/failures.csv", "does not say its um per pixel", quoted),
    ):
        table = project.results / path
        before = table.read_text()
        table.write_text(before.replace(words, evil))
        assert table.read_text() != before
    # Sealed as if the job had written it so: only the report is to be made again.
    folder, plan = project.results / "cohort", project.json("plan.json")
    seal_tables(folder / "tables.json", [folder / "slides.csv", folder / "failures.csv"])
    write_record(project.results, next(job for job in plan["outcomes"] if job["rule"] == "cohort_table"))
    outcome = project.succeed()
    assert set(outcome.jobs()) == {"write_report", "all"}, outcome.text
    page = browser.open(project.results / "report" / "index.html")
    assert page.value("document.title") == f"Title {EVIL}"
    assert page.value("document.querySelectorAll('img[src=x]').length") == 0
    text = page.value("document.body.innerText")
    assert text.count(EVIL) >= 3
    assert page.console == []
