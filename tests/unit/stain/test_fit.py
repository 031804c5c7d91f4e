"""Fits and references: known vectors, TIAToolbox and scikit-learn as oracles, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slidemake.core.failures import RunError
from slidemake.stain import targets as stain_targets
from slidemake.stain.colour import GLASS_OD, lab_to_rgb, luminosity_mask, optical_density, rgb_to_lab
from slidemake.stain.fit import (
    METHODS,
    StainRefused,
    StainTransform,
    apply_stain_numpy,
    estimate_white_point,
    fit_stain,
    resolve_method,
    stain_transform,
)
from slidemake.stain.targets import no_target, pool_targets, target_from_image, target_from_pixels
from slidemake.stain.vectors import RUIFROK, angle_degrees, haematoxylin_first, vahadane_vectors

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real images to read")

LABS = {
    "ruifrok": [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]],
    "purple": [[0.53, 0.75, 0.39], [0.15, 0.83, 0.53]],
    "faded": [[0.56, 0.72, 0.41], [0.21, 0.90, 0.38]],
}
DAB = [[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]]


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draw(vectors, n=60_000, seed=0, white=255.0, strength=(1.0, 1.0)) -> np.ndarray:
    """(n, 3) uint8 pixels by Beer-Lambert: a third nuclei, a third stroma, a third both."""
    rng = np.random.default_rng(seed)
    kind = rng.random(n)
    first = np.where(kind < 0.35, rng.gamma(4, 0.3, n), rng.gamma(1.0, 0.08, n)) * strength[0]
    second = np.where(kind > 0.3, rng.gamma(4, 0.18, n), rng.gamma(1.0, 0.05, n)) * strength[1]
    clean = white * np.exp(-np.stack([first, second], axis=1) @ unit(vectors))
    return np.clip(np.rint(clean + rng.normal(0, 1, (n, 3))), 0, 255).astype(np.uint8)


def as_image(pixels: np.ndarray, side: int = 200) -> np.ndarray:
    return pixels[: side * side].reshape(side, side, 3)


@pytest.fixture(scope="module")
def he_image() -> np.ndarray:
    """Real H&E: the reference image that ships in TIAToolbox, (1000, 1000, 3)."""
    if importlib.util.find_spec("tiatoolbox") is None:
        pytest.skip("TIAToolbox is not installed")
    with Image.open(stain_targets._tiatoolbox_image()) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def other_lab(he_image) -> np.ndarray:
    """A part of the same tissue as another lab would stain and scan it."""
    od = optical_density(he_image[:400, 300:800], np.full(3, 255.0))
    return np.clip(np.rint(255 * np.exp(-od * [0.7, 0.85, 0.6])), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tiatoolbox_normalizer():
    """Import takes 9 s, hence once."""
    return pytest.importorskip("tiatoolbox.tools.stainnorm").get_normalizer


# --- fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["macenko", "vahadane"])
@pytest.mark.parametrize("lab", sorted(LABS))
def test_known_vectors_are_found_within_five_degrees(method, lab):
    fit = fit_stain(draw(LABS[lab]), method)
    for found, true in zip(np.array(fit.stain_matrix), unit(LABS[lab]), strict=True):
        assert angle_degrees(found, true) < 5
        assert np.linalg.norm(found) == pytest.approx(1)


def test_vectors_do_not_depend_on_the_glass_when_it_is_known():
    white = np.array([240.0, 230.0, 215.0])
    tinted = fit_stain(draw(LABS["purple"], white=white), "macenko", white)
    clear = fit_stain(draw(LABS["purple"]), "macenko")
    for a, b in zip(np.array(tinted.stain_matrix), np.array(clear.stain_matrix), strict=True):
        assert angle_degrees(a, b) < 1.5
    assert tinted.max_concentrations == pytest.approx(clear.max_concentrations, rel=0.05)


def test_fits_are_deterministic_and_json_able():
    pixels = draw(LABS["purple"], n=20_000)
    for method in METHODS:
        first, second = fit_stain(pixels, method), fit_stain(pixels.copy(), method)
        assert first == second
        assert json.loads(json.dumps(first.as_dict())) == json.loads(json.dumps(second.as_dict()))
        assert first.pixels == 20_000


def test_vahadane_reaches_the_optimum_of_scikit_learns_dictionary_learning():
    from sklearn.decomposition import DictionaryLearning

    od = optical_density(draw(LABS["ruifrok"], n=1000), np.full(3, 255.0))
    od = od[luminosity_mask(draw(LABS["ruifrok"], n=1000))]
    oracle = DictionaryLearning(
        2,
        alpha=0.1,
        fit_algorithm="cd",
        positive_code=True,
        positive_dict=True,
        max_iter=500,
        tol=1e-10,
        dict_init=RUIFROK.copy(),
        code_init=np.maximum(od @ np.linalg.pinv(RUIFROK), 0),
        random_state=0,
    ).fit(od)
    for ours, theirs in zip(vahadane_vectors(od), haematoxylin_first(oracle.components_), strict=True):
        assert angle_degrees(ours, theirs) < 0.05


@pytest.mark.parametrize("method", ["macenko", "ruifrok", "reinhard"])
def test_same_output_as_tiatoolbox(method, he_image, other_lab, tiatoolbox_normalizer):
    theirs = tiatoolbox_normalizer(method)
    theirs.fit(he_image.copy())
    expected = theirs.transform(other_lab.copy()).astype(float)
    fit, target = fit_stain(other_lab.reshape(-1, 3), method), target_from_image("tiatoolbox", method)
    ours = apply_stain_numpy(other_lab[None], stain_transform(fit, target))[0].astype(float)
    tissue = np.ones(other_lab.shape[:2], bool)
    if method == "reinhard":  # ours fades glass to white, theirs stains it
        tissue = optical_density(other_lab, np.full(3, 255.0)).mean(-1) >= GLASS_OD
        assert tissue.mean() > 0.8
        means, deviations = theirs.get_mean_std(other_lab)
        assert fit.lab_mean == pytest.approx(means, abs=0.1)
        assert fit.lab_std == pytest.approx(deviations, abs=0.1)
    else:
        source = unit(theirs.extractor.get_stain_matrix(other_lab.copy()))
        assert max(angle_degrees(a, b) for a, b in zip(np.array(fit.stain_matrix), source, strict=True)) < 0.2
        reference = theirs.maxC_target[0] * np.linalg.norm(theirs.stain_matrix_target, axis=1)
        assert target["max_concentrations"] == pytest.approx(reference, rel=2e-3)
        assert np.allclose(target["stain_matrix"], unit(theirs.stain_matrix_target), atol=1e-3)
    assert np.abs(ours - expected)[tissue].mean() < 1.5


def test_luminosity_mask_is_tiatoolboxs(other_lab, tiatoolbox_normalizer):
    from tiatoolbox.utils.misc import get_luminosity_tissue_mask

    theirs = get_luminosity_tissue_mask(other_lab.copy(), 0.8).ravel()
    assert (luminosity_mask(other_lab.reshape(-1, 3)) == theirs).mean() > 0.998  # their CIELAB is 8-bit fixed point


def test_lab_is_scikit_images():
    from skimage.color import rgb2lab

    rgb = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    assert np.abs(rgb_to_lab(rgb) - rgb2lab(rgb)).max() < 0.05
    assert np.abs(lab_to_rgb(rgb_to_lab(rgb)) - rgb).max() < 0.05


# --- refusals ----------------------------------------------------------------------------------------------------


def test_blank_and_nearly_blank_pixels_are_refused():
    noise = np.random.default_rng(0).integers(238, 248, (50_000, 3), dtype=np.uint8)
    for pixels in (np.empty((0, 3), np.uint8), np.full((10_000, 3), 255, np.uint8), noise):
        for method in METHODS:
            with pytest.raises(StainRefused) as refused:
                fit_stain(pixels, method)
            assert refused.value.reason == "too_few_pixels"


def test_one_stain_alone_is_refused():
    rng = np.random.default_rng(0)
    only = np.rint(255 * np.exp(-rng.gamma(3, 0.3, (20_000, 1)) * unit(LABS["ruifrok"])[1])).astype(np.uint8)
    for method in METHODS:
        with pytest.raises(StainRefused, match="one stain only") as refused:
            fit_stain(only, method)
        assert refused.value.reason == "single_stain"


@pytest.mark.parametrize("brown", [0.05, 0.3, 1.0])
def test_dab_is_refused(brown):
    rng = np.random.default_rng(1)
    amounts = np.stack([rng.gamma(2, 0.4, 50_000), rng.gamma(2, 0.4, 50_000) * (rng.random(50_000) < brown)], axis=1)
    pixels = np.clip(240 * np.exp(-amounts @ unit(DAB)) + rng.normal(0, 2, (50_000, 3)), 0, 255).astype(np.uint8)
    with pytest.raises(StainRefused) as refused:
        fit_stain(pixels, "macenko", 240)
    assert refused.value.reason == "not_he"


def test_unknown_method():
    with pytest.raises(ValueError, match="macenko, vahadane, reinhard, ruifrok"):
        fit_stain(draw(LABS["purple"]), "makenko")


@needs_data
def test_real_kidney_he_is_fitted_and_its_ihc_is_refused():
    def pixels(name):
        image = np.asarray(Image.open(Path(DATA) / "images" / name).convert("RGB"))
        return image[optical_density(image, np.full(3, 243.0)).mean(-1) > 0.08]

    assert fit_stain(pixels("Rat-Kidney_HE.jpg"), "macenko", 243).stain_matrix is not None
    with pytest.raises(StainRefused) as refused:
        fit_stain(pixels("Rat-Kidney_PanCytokeratin.jpg"), "macenko", 242)
    assert refused.value.reason == "not_he"


def colon_tiles(n: int) -> np.ndarray:
    files = sorted((Path(DATA) / "tiles_colon").rglob("*.jp*g"))
    return np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files[:: len(files) // n][:n]])


def restain(tiles: np.ndarray, haematoxylin: float, eosin: float) -> np.ndarray:
    """The same tissue from a lab with other amounts of the two stains."""
    basis = np.vstack([RUIFROK, np.cross(*RUIFROK)])
    amounts = optical_density(tiles, np.full(3, 255.0)) @ np.linalg.inv(basis)
    return np.clip(255 * np.exp(-(amounts * [haematoxylin, eosin, 1]) @ basis), 0, 255).astype(np.uint8)


@needs_data
@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_four_sites_are_fitted_and_brought_together(method):
    tiles = colon_tiles(6)
    sites = [restain(tiles, *gains) for gains in ((1.0, 1.0), (1.3, 0.75), (0.75, 1.25), (1.15, 1.15))]
    target = target_from_pixels(tiles, method)
    after = [apply_stain_numpy(t, stain_transform(fit_stain(t.reshape(-1, 3), method), target)) for t in sites]

    def spread(images):
        return np.std([image.reshape(-1, 3).mean(axis=0) for image in images], axis=0).mean()

    assert spread(after) < 0.5 * spread(sites)


# --- references --------------------------------------------------------------------------------------------------


def test_target_of_tiatoolbox_has_its_published_constants(he_image):
    target = target_from_image("tiatoolbox", "macenko")
    assert np.allclose(target["stain_matrix"], [[0.528, 0.752, 0.394], [0.150, 0.833, 0.533]], atol=1e-3)
    assert target["max_concentrations"] == pytest.approx([2.889, 1.097], abs=2e-3)
    assert target["source"] == "tiatoolbox"
    same = target_from_image(he_image, "macenko")
    assert same["stain_matrix"] == target["stain_matrix"]


def test_target_from_a_file_and_its_hash(tmp_path):
    Image.fromarray(as_image(draw(LABS["purple"]))).save(tmp_path / "mine.png")
    target = target_from_image(tmp_path / "mine.png", "macenko")
    assert json.loads(json.dumps(target))["status"] == "ok"
    assert target == target_from_image(str(tmp_path / "mine.png"), "macenko")
    assert target["hash"] != target_from_image(tmp_path / "mine.png", "vahadane")["hash"]


def test_target_that_is_no_use_says_so(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(RunError, match=r"text\.png"):
        target_from_image(tmp_path / "text.png", "macenko")
    with pytest.raises(RunError, match=r"gone\.png"):
        target_from_image(tmp_path / "gone.png", "macenko")
    with pytest.raises(RunError, match=r"stain\.target"):
        target_from_pixels(np.full((100, 100, 3), 255, np.uint8), "macenko")
    monkeypatch.setattr(stain_targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"slidemake\[tiatoolbox\]"):
        target_from_image("tiatoolbox", "macenko")


def test_pooled_target_is_the_median_of_the_fits():
    fits = [fit_stain(draw(LABS[lab], seed=i, white=240), "macenko", 240) for i, lab in enumerate(sorted(LABS))]
    refused = {"status": "none", "method": "macenko", "reason": "not_he"}
    target = pool_targets([*({"status": "ok", **fit.as_dict()} for fit in fits), refused], "macenko")
    median = unit(np.median([fit.stain_matrix for fit in fits], axis=0))
    assert np.allclose(target["stain_matrix"], median, atol=1e-7)
    assert target["max_concentrations"][0] == pytest.approx(sorted(f.max_concentrations[0] for f in fits)[1])
    assert target["white_point"] == [255.0] * 3
    assert target["slides"] == 3
    moments = pool_targets([fit_stain(draw(LABS["faded"]), "reinhard").as_dict()], "reinhard")
    assert moments["lab_mean"] is not None
    assert moments["stain_matrix"] is None
    assert pool_targets([refused], "macenko")["status"] == "none"


def test_resolve_method():
    assert resolve_method("auto", "required") == "macenko"
    assert {resolve_method("auto", advice) for advice in ("recommended", "allowed", "discouraged")} == {"none"}
    assert resolve_method("reinhard", "discouraged") == "reinhard"


# --- transforms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_reference_onto_itself_changes_nothing(method, he_image):
    target = target_from_image(he_image, method)
    out = apply_stain_numpy(he_image[None], stain_transform(target, target))[0]
    assert np.abs(out.astype(float) - he_image).mean() < 2


def test_ruifrok_applied_twice_is_ruifrok_applied_once(he_image):
    target = target_from_image(he_image, "ruifrok")
    once = apply_stain_numpy(he_image[None], stain_transform(target, target))
    twice = apply_stain_numpy(once, stain_transform(target, target))
    assert np.abs(twice.astype(float) - once).mean() < 1


@pytest.mark.parametrize("method", METHODS)
def test_glass_stays_white_and_blank_tiles_stay_as_they_are(method):
    white = (240.0, 236.0, 228.0)
    fit = fit_stain(draw(LABS["faded"], white=np.array(white)), method, white)
    transform = stain_transform(fit, target_from_pixels(draw(LABS["purple"]), method))
    tile = as_image(draw(LABS["faded"], white=np.array(white)), 64)
    tile[:, :32] = white
    blank = np.random.default_rng(0).integers(225, 256, (64, 64, 3), dtype=np.uint8)
    out = apply_stain_numpy(np.stack([tile, blank, np.full_like(blank, 255)]), transform)
    assert out[0, :, :32].min() >= 250
    assert np.array_equal(out[1], blank)
    assert out[2].min() == 255


def test_slide_level_fit_varies_less_than_tile_level_fits():
    """The same cells in patches of a slide that hold few, some and many nuclei: fits per patch pull them apart."""
    target = target_from_pixels(draw(LABS["purple"]), "macenko")
    cells = as_image(draw(LABS["faded"], n=400, seed=9), 20)
    patches = []
    for i, nuclei in enumerate((0.3, 0.6, 1.0, 1.5)):
        patch = as_image(draw(LABS["faded"], seed=i, strength=(nuclei, 1.0)))
        patch[:20, :20] = cells
        patches.append(patch)
    slide = fit_stain(np.concatenate([patch.reshape(-1, 3) for patch in patches]), "macenko")

    def spread(fits):
        out = [apply_stain_numpy(p[None], stain_transform(f, target))[0] for p, f in zip(patches, fits, strict=True)]
        return np.std([image[:20, :20].astype(float) for image in out], axis=0).mean()

    assert spread([slide] * 4) == 0
    assert spread([fit_stain(patch.reshape(-1, 3), "macenko") for patch in patches]) > 5


def test_transform_round_trips_through_json():
    target = target_from_pixels(draw(LABS["purple"]), "macenko")
    for fit in (fit_stain(draw(LABS["faded"]), "macenko"), {"status": "none", "reason": "not_he", "method": "macenko"}):
        transform = stain_transform(fit, target)
        again = StainTransform.from_dict(json.loads(json.dumps(transform.as_dict())))
        assert again == transform
        assert again.as_dict()["fingerprint"] == transform.as_dict()["fingerprint"]
        assert (transform.method, transform.target) == ("macenko", target["hash"])
    changed = dataclasses.replace(transform, reason="single_stain")
    assert changed.as_dict()["fingerprint"] != transform.as_dict()["fingerprint"]


def test_no_normalisation_leaves_pixels_alone():
    tiles = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    fit = fit_stain(draw(LABS["faded"]), "macenko")
    for transform in (
        stain_transform(fit, no_target("method none")),
        stain_transform({"status": "none", "reason": "not_he"}, target_from_pixels(draw(LABS["purple"]), "macenko")),
    ):
        assert np.array_equal(apply_stain_numpy(tiles, transform), tiles)
    assert apply_stain_numpy(tiles[:0], transform).shape == (0, 16, 16, 3)


def test_fit_and_reference_of_different_methods_are_refused():
    with pytest.raises(RunError, match=r"'macenko'.*'reinhard'"):
        stain_transform(fit_stain(draw(LABS["faded"]), "macenko"), target_from_pixels(draw(LABS["purple"]), "reinhard"))


# --- white point -------------------------------------------------------------------------------------------------


def test_white_point_is_the_glass():
    rng = np.random.default_rng(0)
    overview = np.full((100, 200, 3), (243, 239, 231)) + rng.integers(-3, 4, (100, 200, 1))
    overview[:, :50] = 255  # nothing was scanned there
    overview[40:60, 100:120] = (60, 160, 70)  # pen
    overview[60:, 150:] = (150, 80, 140)
    tissue = np.zeros((100, 200), bool)
    tissue[60:, 150:] = True
    assert estimate_white_point(overview.astype(np.uint8), tissue) == pytest.approx((243, 239, 231), abs=1)


def test_white_point_without_glass_is_255_and_saturated_glass_is_255():
    purple = np.full((50, 50, 3), (150, 80, 140), np.uint8)
    assert estimate_white_point(purple, np.zeros((50, 50), bool)) == (255.0, 255.0, 255.0)
    assert estimate_white_point(np.full((50, 50, 3), 240, np.uint8), np.ones((50, 50), bool)) == (255.0, 255.0, 255.0)
    assert estimate_white_point(np.full((50, 50, 3), 255, np.uint8), np.zeros((50, 50), bool)) == (255.0, 255.0, 255.0)
