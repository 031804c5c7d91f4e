"""The stain stage on small slides written here: what it pools, what it writes, what it takes as finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slidemake.core.failures import SlideFailure
from slidemake.core.files import read_json, write_json
from slidemake.stain import stage as stain_stage
from slidemake.stain.stage import make_target, process_slide, regions, slide_transform
from slidemake.stain.vectors import angle_degrees

pyvips = pytest.importorskip("pyvips")

HE, IHC = [[0.53, 0.75, 0.39], [0.15, 0.83, 0.53]], [[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]]
GLASS = np.array([242.0, 238.0, 230.0])
SIDE = 2048  # px at 0.5 um/px; tissue fills a square in the middle
OPTIONS = {"method": "macenko", "white_point": "estimate", "max_pixels": 20_000}


def make_slide(results: Path, slide_id: str, vectors: list[list[float]]) -> dict:
    """A pyramidal slide with its slide.json and tissue files; returns the tissue stage's record."""
    rng = np.random.default_rng(0)
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    cells = (SIDE // 8, SIDE // 8)  # blobs of 8 px, so that averaging to 1 um/px keeps pure colours
    nucleus = rng.random(cells) < 0.4
    amounts = np.stack([nucleus * rng.gamma(6, 0.2, cells), ~nucleus * rng.gamma(6, 0.12, cells)], axis=-1)
    image = np.kron(np.exp(-amounts @ unit), np.ones((8, 8, 1))) * GLASS
    image[:512], image[-512:], image[:, :512], image[:, -512:] = GLASS, GLASS, GLASS, GLASS
    image = np.clip(image + rng.integers(-1, 2, image.shape[:2] + (1,)), 0, 255).astype(np.uint8)
    folder = results / "slides" / slide_id
    folder.mkdir(parents=True)
    slide = pyvips.Image.new_from_array(image).copy(interpretation="srgb", xres=2000, yres=2000)
    slide.tiffsave(str(folder / "slide.tiff"), tile=True, pyramid=True, compression="deflate", resunit="cm")
    mask = np.zeros((SIDE // 16, SIDE // 16), np.uint8)
    mask[32:96, 32:96] = 255
    Image.fromarray(mask).save(folder / "tissue.png")
    write_json(folder / "tissue.json", {"level0_per_mask_px": [16.0, 16.0], "mask_mpp": 8.0})
    described = {"slide_id": slide_id, "path": str(folder / "slide.tiff"), "reader": "openslide", "mpp": 0.5}
    write_json(folder / "slide.json", {**described, "bounds": None})
    return {"slide_id": slide_id, "status": "ok", "fingerprint": f"tissue-of-{slide_id}"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    make_slide(root, "he", HE)
    make_slide(root, "ihc", IHC)
    return root


def record(slide_id: str) -> dict:
    return {"slide_id": slide_id, "status": "ok", "fingerprint": f"tissue-of-{slide_id}"}


def test_slide_is_fitted_written_and_taken_as_finished(results):
    figures = process_slide(record("he"), results, OPTIONS)
    path = results / "slides" / "he" / "stain.json"
    text = path.read_text()
    stored = read_json(path)
    assert stored.pop("tissue")["eosin"] is True  # with its sample of pixels, which no manifest needs
    assert stored == json.loads(json.dumps(figures))
    assert (figures["status"], figures["reason"], figures["pixels"]) == ("ok", None, 20_000)
    assert figures["white_point"] == pytest.approx(GLASS, abs=1)
    for found, true in zip(np.array(figures["stain_matrix"]), np.array(HE), strict=True):
        assert angle_degrees(found, true) < 5
    again = process_slide(record("he"), results, OPTIONS)
    assert again["reused"]
    assert path.read_text() == text
    path.unlink()
    process_slide(record("he"), results, OPTIONS)
    assert path.read_text() == text  # same input, same bytes


def test_other_method_or_tissue_is_fitted_anew(results):
    first = process_slide(record("he"), results, OPTIONS)
    other = process_slide(record("he"), results, {**OPTIONS, "method": "reinhard"})
    changed = process_slide({**record("he"), "fingerprint": "edited"}, results, {**OPTIONS, "method": "reinhard"})
    assert len({first["fingerprint"], other["fingerprint"], changed["fingerprint"]}) == 3
    assert "reused" not in changed
    assert other["lab_mean"] is not None


def test_white_point_255(results):
    assert process_slide(record("he"), results, {**OPTIONS, "white_point": 255})["white_point"] == (255.0,) * 3


def test_ihc_goes_on_without_a_stain(results):
    figures = process_slide(record("ihc"), results, OPTIONS)
    assert (figures["status"], figures["reason"], figures["stain_matrix"]) == ("none", "not_he", None)
    process_slide(record("he"), results, OPTIONS)
    target = make_target(results, "cohort", "macenko", ["he", "ihc"])
    assert (target["status"], target["slides"]) == ("ok", 1)
    assert slide_transform(results, "he", target)["status"] == "ok"
    passed = slide_transform(results, "ihc", target)
    assert (passed["status"], passed["method"], passed["target"]) == ("none", "macenko", target["hash"])


def test_method_none_reads_no_slide(results, monkeypatch):
    monkeypatch.setattr(stain_stage, "open_screened", None)
    figures = process_slide(record("he"), results, {"method": "none"})
    assert (figures["status"], figures["reason"]) == ("none", "method none")
    target = make_target(results, "tiatoolbox", "none", ["he"])
    assert slide_transform(results, "he", target)["status"] == "none"


def test_regions_that_do_not_decode_are_left_out(results, monkeypatch):
    class Damaged:
        def __init__(self, *args, **kwargs):
            self.reader, self.calls = real(*args, **kwargs), 0

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.reader.close()

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def read(self, *args):
            self.calls += 1
            if self.calls % 3 == 0 or broken == "all":
                raise OSError("corrupt JPEG data")
            return self.reader.read(*args)

    real, broken = stain_stage.open_screened, "some"
    monkeypatch.setattr(stain_stage, "open_screened", Damaged)
    monkeypatch.setattr(stain_stage, "best_level", lambda reader, downsample: 0)
    figures = process_slide({**record("he"), "fingerprint": "damaged"}, results, OPTIONS)
    assert figures["status"] == "ok"
    assert figures["unreadable_regions"] >= 10
    broken = "all"
    with pytest.raises(SlideFailure, match="regions of tissue") as failure:
        process_slide({**record("he"), "fingerprint": "all damaged"}, results, OPTIONS)
    assert failure.value.code == "unreadable"


def test_regions_are_spread_over_all_tissue():
    tissue = np.zeros((400, 400), bool)
    tissue[10:150, 10:150] = tissue[250:390, 250:390] = True
    corners = np.array(regions(tissue, (16.0, 16.0), 128.0, wanted=100_000))
    assert len(corners) == 50
    assert len(np.unique(corners, axis=0)) == 50
    for low, high in ((0, 2400), (4000, 6400)):
        inside = ((corners >= low - 128) & (corners < high)).all(axis=1)
        assert 20 <= inside.sum() <= 30  # both pieces of the same size get the same share
    assert np.ptp(corners[:, 0]) > 5000
    inside_tissue = tissue[(corners[:, 1] // 16 + 4).astype(int), (corners[:, 0] // 16 + 4).astype(int)]
    assert inside_tissue.all()


def test_regions_of_little_or_no_tissue():
    tissue = np.zeros((50, 50), bool)
    assert regions(tissue, (16.0, 16.0), 128.0, 1000) == []
    tissue[3, 4] = True
    assert regions(tissue, (16.0, 16.0), 128.0, 1000) == [(0.0, 0.0)]
