"""The demo cohort: its sheet, its pixels, its truth, and the slides that are spoilt on purpose."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image
from slidemake.core.failures import RunError
from slidemake.core.files import file_sha256
from slidemake.demo import cohort as demo
from slidemake.demo.cohort import (
    DEMO,
    EASY,
    SHEET_COLUMNS,
    demo_rows,
    draw_demo_cohort,
    draw_demo_slide,
    rows_of_sheet,
    slide_fingerprint,
    slides_folder,
    write_demo_sheet,
)
from slidemake.demo.layout import MakeUp, make_plan
from slidemake.demo.scanner import SITES, scan, unit_vectors
from slidemake.demo.sprites import DENSITY

SIDE = 1536
REPOSITORY = Path(__file__).resolve().parents[3]


def row_with(**wanted: str) -> dict[str, str]:
    return next(row for row in demo_rows() if all(row[key] == value for key, value in wanted.items()))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """One slide of each site, both classes, and each spoilt one; 1,536 px wide."""
    folder = tmp_path_factory.mktemp("demo")
    wanted = {"P01-A", "P02-A", "P03-A", "P04-A", "P05-A", "P06-A", "P08-A", "P06-B", "P13-B", "P14-A", "P18-B"}
    rows = [row for row in demo_rows() if row["slide_id"] in wanted]
    records = draw_demo_cohort(rows, folder, folder / "demo.json", side=SIDE, processes=1)
    return folder, {record["slide_id"]: record for record in records}


def read(folder: Path, slide_id: str) -> np.ndarray:
    with openslide.OpenSlide(folder / f"{slide_id}.tiff") as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def mask(folder: Path, slide_id: str, kind: str) -> np.ndarray:
    return np.asarray(Image.open(folder / "truth" / f"{slide_id}_{kind}16.png")) > 0


def test_cohort_is_balanced_over_sites_and_has_the_spoilt_slides():
    rows = demo_rows()
    assert len({row["slide_id"] for row in rows}) == len(rows) == 35
    patients = {row["patient_id"]: row for row in rows}
    assert len(patients) == 30
    for site in SITES:
        own = [row["diagnosis"] for row in patients.values() if row["site"] == site]
        assert own.count("tumour") == own.count("benign") == 5
    mishaps = [row["mishap"] for row in rows]
    for spoilt in ("blank", "no_mpp", "truncated"):
        assert mishaps.count(spoilt) == 1
    assert {"pen_blue", "pen_green", "blur", "fold", "bubble"} <= set(mishaps)
    good = [row["patient_id"] for row in rows if row["mishap"] not in ("blank", "no_mpp", "truncated")]
    assert set(good) == set(patients)
    assert len(good) == 32  # two patients have two good slides
    for patient in patients:
        assert len({row["diagnosis"] for row in rows if row["patient_id"] == patient}) == 1


def test_recurrence_follows_the_site_and_not_the_diagnosis():
    for seed in range(5):
        patients = {row["patient_id"]: row for row in demo_rows(300, seed)}.values()
        for column, value, low, high in (("site", "Harbour", 0.8, 1.0), ("site", "Valecross", 0.0, 0.2)):
            own = [row["recurrence"] == "recurred" for row in patients if row[column] == value]
            assert low < np.mean(own) < high
        shares = [
            np.mean([row["recurrence"] == "recurred" for row in patients if row["diagnosis"] == diagnosis])
            for diagnosis in ("tumour", "benign")
        ]
        assert abs(shares[0] - shares[1]) < 0.15


def test_committed_sheet_is_the_generated_one(tmp_path):
    sheet = tmp_path / "config" / "demo" / "slides.csv"
    write_demo_sheet(sheet)
    assert sheet.read_text() == (REPOSITORY / "config" / "demo" / "slides.csv").read_text()
    with open(sheet, newline="") as handle:
        assert tuple(next(csv.reader(handle))) == SHEET_COLUMNS
    rows = rows_of_sheet(sheet)
    assert rows == demo_rows()
    assert slides_folder(sheet, rows) == tmp_path / "demo_slides"


def test_a_foreign_sheet_is_refused_with_its_row(tmp_path):
    sheet = tmp_path / "slides.csv"
    sheet.write_text("slide_id,path,site,diagnosis\nP01-A,x.tiff,Northfield,tumour\nmine,y.svs,Oslo,tumour\n")
    with pytest.raises(RunError, match=r"row 3: slide 'mine'"):
        rows_of_sheet(sheet)


@pytest.mark.parametrize("side", [1500, 512])
def test_a_side_that_does_not_tile_is_refused(tmp_path, side):
    with pytest.raises(RunError, match="multiple of 256"):
        draw_demo_slide(demo_rows()[0], tmp_path / "a.tiff", side=side)


def test_same_bytes_again_and_other_seed_other_bytes(drawn, tmp_path):
    folder, records = drawn
    row = row_with(slide_id="P02-A")
    again = draw_demo_slide(row, tmp_path / "P02-A.tiff", side=SIDE)
    assert (tmp_path / "P02-A.tiff").read_bytes() == (folder / "P02-A.tiff").read_bytes()
    for kind in ("tissue", "tumour"):
        assert np.array_equal(mask(tmp_path, "P02-A", kind), mask(folder, "P02-A", kind))
    assert {**again, "seconds": 0} == {**records["P02-A"], "seconds": 0}
    other = draw_demo_slide(row, tmp_path / "other.tiff", side=SIDE, seed=1)
    assert other["sha256"] != again["sha256"]
    assert other["fingerprint"] != again["fingerprint"]


def test_geometry_pyramid_and_resolution(drawn):
    folder, _ = drawn
    with openslide.OpenSlide(folder / "P01-A.tiff") as slide:
        assert slide.dimensions == (SIDE, SIDE)
        assert slide.level_count >= 3
        assert slide.level_downsamples[1] == pytest.approx(2)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        assert slide.properties["tiff.ResolutionUnit"] == "centimeter"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-4)


def test_slide_without_resolution_opens_but_has_no_mpp(drawn):
    folder, _ = drawn
    with openslide.OpenSlide(folder / "P13-B.tiff") as slide:
        assert "openslide.mpp-x" not in slide.properties
        assert "tiff.XResolution" not in slide.properties
        assert np.asarray(slide.read_region((700, 700), 0, (64, 64))).shape == (64, 64, 4)
        assert slide.level_count >= 3


def test_truncated_slide_fails_and_ends_before_its_index(drawn):
    folder, _ = drawn
    data = (folder / "P18-B.tiff").read_bytes()
    assert int.from_bytes(data[4:8], "little") > len(data)  # the first directory lies in the part that is lost
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(folder / "P18-B.tiff")


def test_blank_slide_is_blank_but_not_pure_white(drawn):
    folder, records = drawn
    rgb = read(folder, "P06-B").astype(float)
    tint = np.array(SITES[records["P06-B"]["site"]].background)
    assert np.abs(np.median(rgb, axis=(0, 1)) - tint).max() <= 1
    assert (np.abs(rgb - tint).max(-1) > 30).mean() < 0.001  # dust
    assert 1 < rgb.std(axis=(0, 1)).mean() < 6
    assert records["P06-B"]["tissue_fraction"] == 0


def test_truth_masks_agree_with_pixels_and_record(drawn):
    folder, records = drawn
    for slide_id in ("P01-A", "P03-A", "P04-A", "P06-A"):
        record, tissue, tumour = records[slide_id], mask(folder, slide_id, "tissue"), mask(folder, slide_id, "tumour")
        assert tissue.shape == tumour.shape == (SIDE // 16, SIDE // 16)
        assert not (tumour & ~tissue).any()
        assert 0.2 < tissue.mean() < 0.4
        assert record["tissue_fraction"] == pytest.approx(tissue.mean(), abs=1e-4)
        assert record["tumour_fraction"] == pytest.approx(tumour.sum() / tissue.sum(), abs=1e-4)
        if record["diagnosis"] == "tumour":
            assert 0.8 * DEMO.tumour[0] <= record["tumour_fraction"] <= 1.2 * DEMO.tumour[1]
        else:
            assert record["tumour_fraction"] == 0
        saturation = np.ptp(read(folder, slide_id).astype(int), axis=-1)
        cells = saturation.reshape(SIDE // 16, 16, SIDE // 16, 16).mean((1, 3))
        assert (cells[tissue] > 20).mean() > 0.85  # fat and lumina stay pale
        assert (cells[~tissue] > 20).mean() < 0.05


@pytest.mark.parametrize("difficulty", [DEMO, EASY], ids=["demo", "easy"])
def test_full_size_tumour_shares_stay_in_range(difficulty):
    """The plan alone, at full size, at both ends of what is asked for."""
    for number in range(4):
        asked = difficulty.tumour[number % 2]
        made_of = MakeUp(1 + number % 3, 0.25 + 0.03 * (number % 4), asked, lymphoid=0.05)
        plan = make_plan(np.random.default_rng(number), demo.SIDE, made_of)
        tissue = plan.depth > 0
        assert 0.85 * asked <= ((plan.tumour > 0) & tissue).sum() / tissue.sum() <= 1.15 * asked


def test_reactive_tissue_makes_up_for_tumour():
    """Of as much abnormal tissue, tumour is a part in one class and none in the other; the two never overlap."""
    for number in range(3):
        made_of = MakeUp(1, 0.3, tumour=0.06, lymphoid=0.05, reactive=0.1)
        plan = make_plan(np.random.default_rng(number), SIDE, made_of)
        tissue = plan.depth > 0
        assert 0.03 < (plan.reactive > 0)[tissue].mean() <= 0.12
        assert not ((plan.reactive > 0) & (plan.tumour > 0)).any()
        without = make_plan(np.random.default_rng(number), SIDE, MakeUp(1, 0.3, lymphoid=0.05))
        assert without.reactive.max() < 0


def test_difficulty_is_part_of_a_slide(drawn):
    _, records = drawn
    row = row_with(slide_id="P01-A")
    assert records["P01-A"]["fingerprint"] == slide_fingerprint(row, SIDE, 0, DEMO)
    assert slide_fingerprint(row, SIDE, 0, EASY) != records["P01-A"]["fingerprint"]
    benign = [record for record in records.values() if record["diagnosis"] == "benign" and record["drawn"]]
    assert any(record["drawn"]["reactive_glands"] for record in benign)
    assert not any(record["drawn"]["malignant_glands"] for record in benign)


def test_one_site_is_purple_and_one_pale_and_pink():
    """Equal amounts of both stains at every site: Harbour comes out bluest, Valecross reddest and lightest."""
    planes = np.full((32, 32, 2), 60, np.uint8)
    colour = {name: scan(planes, site, np.random.default_rng(0)).mean((0, 1)) for name, site in SITES.items()}
    blue = {name: c[2] - c[0] for name, c in colour.items()}
    assert blue["Harbour"] > blue["Northfield"] + 15
    assert blue["Valecross"] < blue["Northfield"] - 10
    assert colour["Valecross"].mean() > colour["Northfield"].mean() + 15


def test_sites_differ_in_colour(drawn):
    folder, records = drawn
    means = {}
    for slide_id in ("P01-A", "P02-A", "P03-A"):
        tissue = np.kron(mask(folder, slide_id, "tissue"), np.ones((16, 16), bool))
        means[records[slide_id]["site"]] = read(folder, slide_id)[tissue].mean(0)
    assert len(means) == 3
    colours = np.array(list(means.values()))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(colours[i] - colours[j]).max() > 6


@pytest.mark.parametrize("slide_id", ["P01-A", "P03-A", "P05-A"])
def test_beer_lambert_vectors_are_in_the_pixels(drawn, slide_id):
    """Least squares on optical density: the plane of the tissue's pixels contains the site's two stain vectors."""
    folder, records = drawn
    site = SITES[records[slide_id]["site"]]
    tissue = np.kron(mask(folder, slide_id, "tissue"), np.ones((16, 16), bool))
    density = -np.log(np.maximum(read(folder, slide_id)[tissue], 1) / np.array(site.background))
    density = density[density.sum(1) > 0.3]
    _, _, axes = np.linalg.svd(density, full_matrices=False)
    for vector in unit_vectors(site):
        assert np.degrees(np.arccos(np.linalg.norm(axes[:2] @ vector))) < 4


@pytest.mark.parametrize("name", sorted(SITES))
def test_scan_follows_beer_lambert_exactly(name):
    """Known densities in, regressed stain vectors out: within one degree of the site's own."""
    site = SITES[name]
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 120, (16, 16, 2))
    planes = np.repeat(np.repeat(flat, 32, 0), 32, 1).astype(np.uint8)  # patches, so that blur does not mix them
    rgb = scan(planes, site, np.random.default_rng(1)).astype(float)
    middle = rgb.reshape(16, 32, 16, 32, 3)[:, 8:24, :, 8:24].mean((1, 3)).reshape(-1, 3)
    density = -np.log(middle / np.array(site.background))
    amounts = flat.reshape(-1, 2) / DENSITY * np.array([site.gain_h, site.gain_e])
    found, *_ = np.linalg.lstsq(amounts, density, rcond=None)
    for got, known in zip(found, unit_vectors(site), strict=True):
        cosine = got @ known / np.linalg.norm(got)
        assert np.degrees(np.arccos(min(cosine, 1))) < 1
        assert np.linalg.norm(got) == pytest.approx(1, abs=0.03)


def test_sites_stain_a_few_degrees_apart():
    vectors = np.array([unit_vectors(site) for site in SITES.values()])
    for stain in (0, 1):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            angle = np.degrees(np.arccos(vectors[i, stain] @ vectors[j, stain]))
            assert 2 < angle < 16


def test_mishaps_leave_their_mark(drawn):
    folder, records = drawn
    pen = read(folder, "P02-A").astype(int)
    assert ((pen[..., 2] - pen[..., 0] > 60) & (pen[..., 0] < 120)).mean() > 0.005  # blue ink
    assert 0.003 < records["P02-A"]["mishap_fraction"] < 0.1
    for slide_id in ("P05-A", "P08-A", "P14-A"):
        assert 0.002 < records[slide_id]["mishap_fraction"] < 0.1
    assert records["P01-A"]["mishap"] is None
    assert records["P01-A"]["mishap_fraction"] == 0


def test_cohort_reuses_finished_slides_and_redraws_damaged_ones(tmp_path):
    rows = [row for row in demo_rows(8) if row["slide_id"] in ("P01-A", "P06-B", "P07-A")]
    manifest = tmp_path / "m.json"
    first = draw_demo_cohort(rows, tmp_path / "s", manifest, side=768, processes=1)
    assert [record["slide_id"] for record in first] == ["P01-A", "P06-B", "P07-A"]
    assert json.loads(manifest.read_text())["stage"] == "demo"
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tiff")}
    before = file_sha256(tmp_path / "s" / "P07-A.tiff")
    with open(tmp_path / "s" / "P07-A.tiff", "ab") as handle:
        handle.write(b"damage")
    manifest.unlink()
    second = draw_demo_cohort(rows, tmp_path / "s", manifest, side=768, processes=1)
    assert [record["sha256"] for record in second] == [record["sha256"] for record in first]
    assert file_sha256(tmp_path / "s" / "P07-A.tiff") == before
    for name in ("P01-A.tiff", "P06-B.tiff"):
        assert (tmp_path / "s" / name).stat().st_mtime_ns == times[name]
    assert not list((tmp_path / "s").glob(".*tmp-*"))
