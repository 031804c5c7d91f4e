"""The background-only control on slides written here, whose glass tells the label or does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slidemake.core.files import read_json, write_json
from slidemake.embedding.background import background_tiles, background_vectors, embed_background
from slidemake.embedding.forward import Forward
from slidemake.robustness.background_control import background_control, judged
from slidemake.tiles.grid import parse_grid, plan_window, tile_positions
from toy_encoder import ToyEncoder

pyvips = pytest.importorskip("pyvips")

SIDE, GRID = 1024, parse_grid("64px_0.5mpp")
OPTIONS = {"tiles": 12, "seed": 0}
DEEP = (150, 60, 140)


def make_slide(results: Path, slide_id: str, glass: tuple[int, int, int], tissue: slice = slice(256, 768)) -> dict:
    """Tissue fills a square of the mask; what is not tissue has the colour of the glass."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = glass
    image[tissue, tissue] = DEEP
    folder = results / "slides" / slide_id
    folder.mkdir(parents=True)
    slide = pyvips.Image.new_from_array(image).copy(interpretation="srgb", xres=2000, yres=2000)
    slide.tiffsave(str(folder / "slide.tiff"), tile=True, pyramid=True, compression="deflate", resunit="cm")
    mask = np.zeros((SIDE // 16, SIDE // 16), np.uint8)
    mask[tissue.start // 16 : tissue.stop // 16, tissue.start // 16 : tissue.stop // 16] = 255
    Image.fromarray(mask).save(folder / "tissue.png")
    write_json(folder / "tissue.json", {"level0_per_mask_px": [16.0, 16.0], "mask_mpp": 8.0})
    described = {"slide_id": slide_id, "path": str(folder / "slide.tiff"), "reader": "openslide", "mpp": 0.5}
    described |= {"width": SIDE, "height": SIDE, "bounds": None, "levels": [{"downsample": 1.0}]}
    write_json(folder / "slide.json", {**described, "identity": f"{sum(glass):016x}"})
    return {"slide_id": slide_id, "status": "ok", "fingerprint": f"tissue-of-{slide_id}"}


def embed(
    results: Path, record: dict, options: dict = OPTIONS, forward=lambda: Forward(ToyEncoder(), "cpu", 5)
) -> dict:
    found = embed_background(record, GRID, results, "toy", ToyEncoder.identity, options, 0.0, forward)
    return {"slide_id": record["slide_id"], "status": "ok", **found}


def test_tiles_are_of_glass_alone_and_far_from_tissue_first(tmp_path):
    make_slide(tmp_path, "a", (240, 240, 240))
    slide = read_json(tmp_path / "slides/a/slide.json")
    mask = np.asarray(Image.open(tmp_path / "slides/a/tissue.png")) > 0
    window = plan_window(GRID, 0.5, [1.0])
    everywhere = tile_positions(window, SIDE, SIDE)

    def touches(coords, margin):
        return ((coords > 256 - 64 - margin) & (coords < 768 + margin)).all(axis=1)

    far = background_tiles(window, slide, mask, (16.0, 16.0), 40, [0])
    assert len(far) == 40
    assert not touches(far, 64).any()
    assert len(np.unique(far, axis=0)) == 40
    assert not np.array_equal(far, background_tiles(window, slide, mask, (16.0, 16.0), 40, [1]))
    every = background_tiles(window, slide, mask, (16.0, 16.0), 10_000, [0])
    assert np.array_equal(every, everywhere[~touches(everywhere, 0)])
    assert len(every) == 16 * 16 - 8 * 8


def test_the_vector_is_that_of_the_glass_and_is_kept(tmp_path):
    record = make_slide(tmp_path, "a", (240, 230, 220))
    found = embed(tmp_path, record)
    assert found["tiles"] == 12
    vector = background_vectors(tmp_path, "toy", [found])["a"]
    assert vector == pytest.approx([240, 230, 220, 0, 0, 0], abs=1e-6)

    def never():
        raise AssertionError("computed again")

    assert embed(tmp_path, record, forward=never)["reused"]
    assert embed(tmp_path, record, {"tiles": 3, "seed": 0})["tiles"] == 3
    assert embed(tmp_path, {**record, "fingerprint": "other outline"})["tiles"] == 12


def test_a_slide_without_background_takes_no_part(tmp_path):
    found = embed(tmp_path, make_slide(tmp_path, "full", DEEP, slice(0, SIDE)))
    assert found["tiles"] == 0
    assert background_vectors(tmp_path, "toy", [found]) == {}


def glass_cohort(results: Path, follows: bool, count: int = 32) -> dict:
    """Slides whose glass is tinted by their class, or at random; the control's result."""
    rng = np.random.default_rng(5)
    records, rows, labels = [], [], {}
    for i in range(count):
        label = "yes" if i % 2 else "no"
        tinted = label == "yes" if follows else rng.random() < 0.5
        glass = (240, 238 - 4 * tinted + int(rng.integers(3)), 235 + int(rng.integers(3)))
        record = make_slide(results, f"s{i}", glass)
        records.append(embed(results, record))
        rows.append({"slide_id": f"s{i}", "patient_id": f"P{i}", "status": "ok"})
        labels[f"P{i}"] = label
    return background_control(background_vectors(results, "toy", records), labels, rows, nulls=39)


def test_tinted_glass_raises_the_alarm(tmp_path):
    found = glass_cohort(tmp_path, follows=True)
    assert found["finding"]["code"] == "background"
    assert found["auroc"] > 0.95
    assert found["low"] > 0.5
    assert found["p"] == 1 / 40
    assert (found["slides"], found["without"]) == (32, 0)


def test_glass_that_says_nothing_raises_none(tmp_path):
    found = glass_cohort(tmp_path, follows=False)
    assert found["low"] < 0.5
    assert found["high"] - found["low"] > 0.2  # 32 patients: what is not seen may be there all the same
    assert found["finding"]["code"] == "background_not_shown"
    assert found["finding"]["level"] == "note"


@pytest.mark.parametrize(
    ("low", "high", "p", "code"),
    [
        (0.45, 0.6, 0.5, "background_blind"),
        (0.4, 0.85, 0.06, "background_not_shown"),
        (0.52, 0.6, 0.2, "background_not_shown"),  # above 0.5, and no more than permuted labels have
        (0.1, 0.3, 1.0, "background_not_shown"),
        (None, None, 1.0, "background_not_shown"),
        (0.6, 0.8, 0.02, "background"),
    ],
)
def test_background_is_called_blind_only_where_that_is_known(low, high, p, code):
    found = judged({"auroc": 0.5, "low": low, "high": high, "p": p})
    assert found["code"] == code
    assert (found["level"] == "good") == (code == "background_blind")


def test_alarms_are_as_rare_as_promised():
    """40 cohorts of noise at a level of 5 %: 2 are expected; 7 or more have a probability below 0.004."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = [{"slide_id": f"s{i}", "patient_id": f"P{i}", "status": "ok"} for i in range(40)]
        vectors = {row["slide_id"]: rng.normal(size=6) for row in rows}
        labels = {f"P{i}": "ab"[i % 2] for i in range(40)}
        alarms += background_control(vectors, labels, rows, seed, nulls=19)["finding"]["code"] == "background"
    assert alarms < 7


@pytest.mark.parametrize("case", ["three patients", "one class", "none"])
def test_little_data_has_a_reason(case):
    count = 3 if case == "three patients" else 12
    rows = [{"slide_id": f"s{i}", "patient_id": f"P{i}", "status": "ok"} for i in range(count)]
    vectors = {} if case == "none" else {row["slide_id"]: np.arange(4.0) for row in rows}
    labels = {f"P{i}": "a" if case == "one class" else "ab"[i % 2] for i in range(count)}
    found = background_control(vectors, labels, rows)
    assert found["auroc"] is None
    assert found["finding"]["code"] == "background_undefined"
    json.dumps(found, allow_nan=False)
