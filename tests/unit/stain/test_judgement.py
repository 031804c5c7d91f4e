"""Fits are judged before they are used: real tissue with hardly any eosin, drawn stains, IHC, and references."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slidemake.core.failures import RunError
from slidemake.core.files import write_json
from slidemake.report.pictures import stain_sentences
from slidemake.stain.colour import optical_density
from slidemake.stain.fit import REFUSALS, StainRefused, apply_stain_numpy, fit_stain, stain_transform
from slidemake.stain.judgement import (
    MAX_GLASS,
    REASONS,
    columns_of,
    describe_pixels,
    fit_reasons,
    hue_angle,
    in_words,
    judged_transform,
)
from slidemake.stain.stage import slide_transform
from slidemake.stain.targets import pool_targets, target_from_image, target_from_pixels
from slidemake.stain.vectors import RUIFROK

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real images to read")
REFERENCE = np.array([[0.53, 0.75, 0.39], [0.15, 0.83, 0.53]])  # about what TIAToolbox's image has
DAB = np.array([[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]])


def draw(vectors=RUIFROK, haematoxylin=1.0, eosin=1.0, glass=0.1, n=20_000, seed=0) -> np.ndarray:
    """(n, 3) uint8 by Beer-Lambert: nuclei, stroma and some glass."""
    rng = np.random.default_rng(seed)
    kind = rng.random(n)
    first = np.where(kind < 0.4, rng.gamma(6, 0.2, n), 0.05) * haematoxylin
    second = np.where(kind < 0.4, 0.1, rng.gamma(6, 0.12, n)) * eosin
    amounts = np.stack([first, second], axis=1) * (rng.random((n, 1)) > glass)
    vectors = np.asarray(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    clean = 255.0 * np.exp(-amounts @ vectors)
    return np.clip(np.rint(clean + rng.normal(0, 1, (n, 3))), 0, 255).astype(np.uint8)


def record(pixels: np.ndarray, method: str = "macenko", white=255.0) -> dict:
    """What stain.json would say of a slide with these pixels."""
    white = np.broadcast_to(np.asarray(white, float), (3,)).tolist()
    found = {"status": "ok", "reason": None, "tissue": describe_pixels(pixels, white)}
    try:
        found |= fit_stain(pixels, method, white).as_dict()
    except StainRefused as refused:
        empty = ("stain_matrix", "max_concentrations", "lab_mean", "lab_std")
        found |= dict.fromkeys(empty) | {"method": method, "white_point": white, "status": "none"}
        found["reason"] = refused.reason
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def target() -> dict:
    return target_from_pixels(draw(REFERENCE), "macenko")


@pytest.fixture(scope="module")
def lung() -> np.ndarray:
    files = sorted((Path(DATA) / "images" / "purple").glob("*.jpeg"))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files[:6]])


def test_two_stains_are_brought_to_the_reference_as_ever(target):
    fit = record(draw())
    found = judged_transform(fit, target)
    assert (found.status, found.applied, found.reason) == ("ok", "both", None)
    assert found.matrix == stain_transform(fit, target).matrix
    assert found.judgement["angles"] == [
        round(hue_angle(v, s), 1) for v, s in zip(fit["stain_matrix"], ("haematoxylin", "eosin"), strict=True)
    ]
    assert max(found.judgement["angles"]) < 5
    assert np.allclose(
        found.judgement["ratios"], np.divide(target["max_concentrations"], fit["max_concentrations"]), atol=1e-3
    )


@needs_data
def test_purple_tissue_keeps_its_nuclei_its_glass_and_its_erythrocytes(lung):
    pixels = lung.reshape(-1, 3)[::7]
    pytest.importorskip("tiatoolbox", reason="its reference image is inside the package")
    reference = target_from_image("tiatoolbox", "macenko")
    fit = record(pixels)
    judged, unjudged = judged_transform(fit, reference), stain_transform(fit, reference)
    assert judged.applied == "haematoxylin"
    assert "eosin_weak" in judged.reason.split()
    assert judged.judgement["ratios"][0] > 2 > 1 / 2 > judged.judgement["ratios"][1]  # what was refused

    def harm(transform):
        """Share of dark nuclei that turn bright red, and what clear pixels gain in density."""
        after = apply_stain_numpy(lung, transform).reshape(-1, 3).astype(float)
        before = lung.reshape(-1, 3)
        red = (after[:, 0] > 180) & (after[:, 1:] < 80).all(axis=1)
        dark, clear = before.sum(axis=1) < 330, optical_density(before, np.full(3, 255.0)).mean(axis=1) < 0.15
        gain = optical_density(after[clear], np.full(3, 255.0)) - optical_density(before[clear], np.full(3, 255.0))
        return (red & dark).sum() / dark.sum(), gain.mean()

    (red, glass), (red_before, glass_before) = harm(judged), harm(unjudged)
    assert red_before > 0.005
    assert glass_before > 0.1
    assert red < red_before / 20
    assert abs(glass) < 0.03
    reddest = lung.reshape(-1, 3)[(lung[..., 0] > 200).ravel() & (lung[..., 1] < 90).ravel()]  # erythrocytes
    after = apply_stain_numpy(np.concatenate([reddest, pixels[:500]])[None, None], judged)[0, 0, : len(reddest)]
    assert len(reddest) > 50
    assert after.mean(axis=0)[1] < 120


def test_one_stain_alone_goes_to_the_references_colour_and_strength(target):
    fit = record(draw(eosin=0.02))
    assert fit["tissue"]["haematoxylin"]
    assert not fit["tissue"]["eosin"]
    found = judged_transform(fit, target)
    assert (found.status, found.applied) == ("ok", "haematoxylin")
    vector = np.array(fit["tissue"]["vector"])
    moved = vector * fit["tissue"]["maximum"] @ np.array(found.matrix)
    assert np.allclose(moved, np.array(target["stain_matrix"][0]) * target["max_concentrations"][0], atol=1e-6)
    assert np.allclose(RUIFROK[1] @ np.array(found.matrix), RUIFROK[1], atol=1e-6)  # an erythrocyte stays as it is
    pink = judged_transform(record(draw(haematoxylin=0.02)), target)
    assert (pink.status, pink.applied) == ("ok", "eosin")


def test_eosin_at_one_place_only_is_no_stain_to_fit(target):
    """A twentieth of the tissue is pink: percentiles find a vector, and its maximum says nothing of the slide."""
    pixels = np.concatenate([draw(eosin=0.02, n=20_000), draw(haematoxylin=0.02, n=600, seed=1)])
    found = judged_transform(record(pixels), target)
    assert found.applied == "haematoxylin"
    assert "eosin_weak" in found.reason.split()


def test_what_no_judgement_can_mend_is_left_alone(target):
    brown = judged_transform(record(draw(DAB)), target)
    assert (brown.status, brown.applied, brown.reason) == ("none", "none", "not_he")
    assert (brown.method, brown.target) == ("macenko", target["hash"])
    tiles = draw(DAB, n=64 * 64).reshape(1, 64, 64, 3)
    assert (apply_stain_numpy(tiles, brown) == tiles).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_concentrations": [9.0, 1.0]}, "maxima"),  # haematoxylin five times stronger, eosin not
        ({"stain_matrix": [[0.95, 0.1, 0.3], [0.05, 0.95, 0.3]]}, "vectors"),
        ({"max_concentrations": [0.2, 0.9]}, "maxima"),
    ],
)
def test_each_limit_is_kept(target, change, reason):
    fit = record(draw())
    fit |= change if "stain_matrix" in change else {}
    reference = {**target, **(change if "max_concentrations" in change else {})}
    found = judged_transform(fit, reference)
    assert found.status == "none"
    assert reason in found.reason.split()


def test_pixels_that_would_leave_the_range_are_counted(target):
    """By hand: a matrix that halves red density and takes green from it sends pure haematoxylin's green above 255."""
    from dataclasses import replace

    from slidemake.stain.judgement import effects

    transform = replace(stain_transform(record(draw()), target), matrix=((1, -1, 0), (0, 0, 0), (0, 0, 1)))
    pixels = np.array([[100, 150, 200]] * 3 + [[200, 150, 100]], np.uint8)  # red density gives negative green in all
    assert effects(pixels, transform)["leaving"] == 1.0
    identity = replace(transform, matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert effects(pixels, identity) == {"leaving": 0.0, "glass": None}


def test_reinhard_is_judged_by_glass_and_range():
    reference = target_from_pixels(draw(REFERENCE, glass=0.0), "reinhard")
    alike = judged_transform(record(draw(REFERENCE, glass=0.0, seed=3), "reinhard"), reference)
    assert alike.applied == "both"
    bright = judged_transform(record(draw(REFERENCE, glass=0.8, eosin=0.8), "reinhard"), reference)
    assert (bright.status, bright.reason) == ("none", "range")


def test_unfit_slides_shape_no_cohort_reference():
    good, bad = record(draw(seed=1)), record(draw(eosin=0.02))
    assert fit_reasons(good) == []
    assert "eosin_weak" in fit_reasons(bad)
    used = [fit for fit in (good, bad) if not fit_reasons(fit)]
    assert pool_targets(used, "macenko")["slides"] == 1


@pytest.mark.parametrize(
    "pixels",
    [
        draw(DAB),
        draw(eosin=0.02),
        draw(haematoxylin=0.02),
        np.random.default_rng(0).integers(0, 255, (20_000, 3), dtype=np.uint8),
        np.full((20_000, 3), (90, 160, 60), np.uint8),
    ],
    ids=["IHC", "haematoxylin only", "eosin only", "noise", "grass"],
)
@pytest.mark.parametrize("method", ["macenko", "reinhard", "ruifrok"])
def test_reference_that_is_no_he_is_refused(pixels, method):
    with pytest.raises(RunError, match=r"stain reference meadow\.png is of no use: .+ Set stain.target"):
        target_from_pixels(pixels, method, "meadow.png")


def test_everything_asks_the_judgement(tmp_path, target):
    """`slide_transform` is the one way from a slide's files to a transform: embedding, tiling and stress use it."""
    folder = tmp_path / "slides" / "s"
    folder.mkdir(parents=True)
    write_json(folder / "stain.json", {"slide_id": "s", **record(draw(eosin=0.02))})
    assert slide_transform(tmp_path, "s", target)["applied"] == "haematoxylin"
    library = Path(judged_transform.__code__.co_filename).parents[1]
    callers = {str(f.relative_to(library)) for f in library.rglob("*.py") if "stain_transform(" in f.read_text()}
    assert callers == {"stain/fit.py", "stain/judgement.py", "report/pictures.py"}  # the report shows what was refused


def test_columns_and_sentences(target):
    rows = []
    for number, pixels in enumerate([draw(), draw(seed=2), draw(eosin=0.02), draw(DAB)]):
        transform = judged_transform(record(pixels), target).as_dict()
        rows.append({"slide_id": str(number), **{k: str(v) for k, v in columns_of(transform).items()}})
    assert [row["stain_applied"] for row in rows] == ["both", "both", "haematoxylin", "none"]
    assert float(rows[0]["stain_ratio_eosin"]) > 0
    assert float(rows[0]["stain_glass"]) < MAX_GLASS
    (sentence,) = stain_sentences([*rows, {"slide_id": "failed", "stain_applied": ""}])
    assert sentence.startswith("2 of 4 slides are brought to the reference, 1 more by haematoxylin alone, 1 goes")
    assert "one stain only (1)" in sentence
    assert "absorbs like DAB" in sentence
    assert "none is the safer choice" in sentence  # a quarter of the slides differ from the others
    (few,) = stain_sentences([rows[0]] * 19 + [rows[3]])
    assert "safer" not in few
    assert stain_sentences([{"slide_id": "1"}]) == []


def test_every_reason_has_words():
    assert set(REFUSALS) <= set(REASONS)
    assert in_words("maxima glass") == f"{REASONS['maxima']}, {REASONS['glass']}"
    assert in_words("") == ""


def test_sample_is_the_slides_pixels():
    pixels = draw(n=5000)
    sample = np.frombuffer(base64.b64decode(describe_pixels(pixels, 255.0)["sample"]), np.uint8).reshape(-1, 3)
    assert len(sample) == 2048
    assert (sample[0] == pixels[0]).all()
    assert (sample[-1] == pixels[-1]).all()
    assert describe_pixels(np.full((100, 3), 250, np.uint8), 255.0) == {}
