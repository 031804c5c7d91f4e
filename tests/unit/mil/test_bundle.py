"""Bundles: written and read back, ensembles, refusals; bags and predictions from stores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import zarr
from mil_cohort import ENCODER, INFO, QUICK, STAIN, planted
from scipy.special import softmax
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import file_sums, write_json
from slidemake.mil.aggregators import build_aggregator, leave_one_out, predict_bag
from slidemake.mil.bags import load_bags, make_bags, open_bags, pack_bags
from slidemake.mil.bundle import (
    Group,
    bundle_leave_one_out,
    check_features,
    is_complete,
    load_bundle,
    predict,
    save_bundle,
)
from slidemake.mil.prediction import apply_bundle_to_stores
from slidemake.tasks.classes import decide
from slidemake.training.train import train_model


def members(*seeds):
    return tuple(build_aggregator("abmil_gated", 8, 2, {"hidden": 16, "attention": 8}, s).eval() for s in seeds)


def write_store(folder, slide, features, encoder=ENCODER, stain=STAIN, **attrs):
    group = zarr.create_group(folder / f"{slide}.zarr", zarr_format=3)
    group.create_array("features", shape=features.shape, dtype=features.dtype, chunks=(max(1, len(features)), 8))
    group["features"][:] = features
    coords = np.stack([np.arange(len(features)) % 3, np.arange(len(features)) // 3], 1) * 8  # rows of three
    group.create_array("coords", shape=coords.shape, dtype=np.int32, chunks=(max(1, len(features)), 2))
    group["coords"][:] = coords
    group.attrs.update(
        {
            "format": "slidemake-embeddings",
            "slide_id": slide,
            "encoder": encoder,
            "stain": {**stain, "slide": slide},
            "grid": "8px",
            "fingerprint": f"fp-{slide}",
            "mpp": {"requested": 0.5},
            "tile_level0_px": [8.0, 8.0],
            **attrs,
        }
    )


def test_two_levels_of_averaging(tmp_path):
    groups = [Group("a", {"temperature": 2.0}, members(1, 2)), Group("b", {"temperature": 0.5}, members(3))]
    save_bundle(tmp_path / "b", INFO, groups)
    bundle = load_bundle(tmp_path / "b")
    x = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    logits = [predict_bag(m, x)[0] for m in members(1, 2, 3)]
    first = softmax(np.mean(logits[:2], axis=0) / 2.0)
    second = softmax(logits[2] / 0.5)
    got = predict(bundle, x)
    np.testing.assert_allclose(got.prob, (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(got.logits, (np.mean(logits[:2], axis=0) + logits[2]) / 2, atol=1e-6)
    assert got.attention.sum() == pytest.approx(1, abs=1e-6)
    changes = [leave_one_out(m, x) for m in members(1, 2, 3)]
    expected = (np.mean(changes[:2], axis=0) + changes[2]) / 2
    np.testing.assert_allclose(bundle_leave_one_out(bundle, x), expected, atol=1e-9)
    assert is_complete(tmp_path / "b", "f")
    assert not is_complete(tmp_path / "b", "g")
    assert not is_complete(tmp_path / "absent", "f")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["bundle.json", "weights.safetensors"]


def test_decisions():
    assert decide(np.array([0.6, 0.4]), ("N", "Y"), 0.4) == "Y"
    assert decide(np.array([0.61, 0.39]), ("N", "Y"), 0.4) == "N"
    assert decide(np.array([0.2, 0.3, 0.5]), ("a", "b", "c"), None) == "c"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights_sha256": "c" * 64}, "weights_sha256"),
        ({"key": "uni"}, "key: 'toy' and 'uni'"),
        ({"transform_sha256": "0"}, "transform_sha256"),
        ({"dim": 9}, "dim: 8 and 9"),
    ],
)
def test_features_of_another_encoder_are_refused(change, says):
    check_features(INFO, {**ENCODER, "timm": "another version"}, STAIN)
    with pytest.raises(RunError, match=f"refuses slide S.*{says}"):
        check_features(INFO, {**ENCODER, **change}, STAIN, "slide S")


def test_another_stain_is_refused():
    with pytest.raises(RunError, match="stain: macenko and none"):
        check_features(INFO, ENCODER, None)
    with pytest.raises(RunError, match="another target"):
        check_features(INFO, ENCODER, {"method": "macenko", "target": "u"})


def test_damaged_bundles(tmp_path):
    with pytest.raises(RunError, match="not a model bundle"):
        load_bundle(tmp_path)
    save_bundle(tmp_path / "b", INFO, [Group("a", {"temperature": 1.0}, members(1))])
    path = tmp_path / "b" / "bundle.json"
    info = json.loads(path.read_text())
    for change, says in [
        ({"format_version": 99}, "version 99"),
        ({"aggregator": {**INFO["aggregator"], "features": 9}}, "does not fit"),
        ({"aggregator": {**INFO["aggregator"], "name": "clam"}}, "needs aggregator 'clam'"),
    ]:
        write_json(path, {**info, **change})
        with pytest.raises(RunError, match=says):
            load_bundle(tmp_path / "b")
    path.write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        load_bundle(tmp_path / "b")
    path.write_text(json.dumps({**info, "threshold": 0.123}))
    with pytest.raises(RunError, match="does not match its checksum"):
        load_bundle(tmp_path / "b")
    path.write_text(json.dumps(info))
    weights = tmp_path / "b" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(RunError, match="cannot be read"):
        load_bundle(tmp_path / "b")


def test_bundle_applied_to_stores_gives_the_predictions_of_training(tmp_path):
    bags, splits = planted()
    train_model(
        {"label": "label"},
        {**QUICK, "epochs": 8},
        bags,
        splits,
        tmp_path / "m",
        {"grid": "8px", "tissue": {"close_um": 1}},
    )
    folder = tmp_path / "stores"
    for i, slide in enumerate(bags.slides):
        write_store(folder, slide, bags.slide(i))
    test = splits.parts(0, "1")[2]
    wanted = [{"slide_id": s, "patient_id": p} for s, p in zip(bags.slides, bags.patients, strict=True) if p in test]
    slides, patients, without, outcome = apply_bundle_to_stores(tmp_path / "m/bundles/repeat0_fold1", folder, wanted)
    assert (without, outcome.classes) == ([], ("N", "Y"))
    assert [r["patient_id"] for r in patients] == test
    saved = (tmp_path / "m/predictions_patients.csv").read_text()
    for row in patients:
        assert f"{row['prob_N']},{row['prob_Y']},{row['logit_N']},{row['logit_Y']},{row['threshold']}" in saved
    assert len(slides) == len(wanted)
    ensemble = load_bundle(tmp_path / "m/bundle")
    assert len(ensemble.groups) == 6
    assert 0 < ensemble.threshold < 1
    assert ensemble.info["tissue"] == {"close_um": 1}
    write_store(folder, "other", bags.slide(0), {**ENCODER, "key": "uni"})
    with pytest.raises(RunError, match="refuses slide other"):
        apply_bundle_to_stores(tmp_path / "m/bundle", folder, [{"slide_id": "other"}])


def test_bags_from_stores(tmp_path):
    rng = np.random.default_rng(0)
    data = {s: rng.normal(size=(n, 8)).astype(np.float16) for s, n in (("b1", 3), ("a2", 0), ("a1", 1), ("c", 4))}
    for slide, x in data.items():
        write_store(tmp_path, slide, x)
    pairs = [("b1", "B"), ("a2", "A"), ("c", "A"), ("a1", "A")]
    pack_bags(tmp_path, pairs, tmp_path / "packed.npy")
    mapped = open_bags(tmp_path / "packed.npy", in_memory_bytes=10)
    for bags in (load_bags(tmp_path, pairs), open_bags(tmp_path / "packed.npy"), mapped):
        assert bags.slides == ("a1", "a2", "c", "b1")
        np.testing.assert_array_equal(bags.bag("A"), np.concatenate([data["a1"], data["c"]]))
        np.testing.assert_array_equal(bags.slide(3), data["b1"])
        assert bags.tiles("nobody") == 0
        assert bags.mpp == 0.5
        assert bags.fingerprints["c"] == "fp-c"
        some = bags.of_patients(["B", "nobody"])
        assert (some.tiles("A"), some.tiles("B")) == (0, 3)
        np.testing.assert_array_equal(some.bag("B"), data["b1"])
        # a1 has one tile, a2 none, c a row of three and one below, eight columns and one beside them
        np.testing.assert_array_equal(bags.places("A"), [[0, 0], [0, 18], [0, 19], [0, 20], [1, 18]])
        np.testing.assert_array_equal(bags.places("B"), [[0, 0], [0, 1], [0, 2]])
    assert isinstance(mapped.features, np.memmap)
    assert mapped.features.dtype == np.float16
    assert bags.encoder == load_bags(tmp_path, pairs).encoder == ENCODER
    mapped.forget()
    np.testing.assert_array_equal(mapped.bag("B"), data["b1"])


def test_packed_bags_that_are_not_whole_are_refused(tmp_path):
    write_store(tmp_path, "a", np.ones((5, 8), np.float32))
    packed = tmp_path / "packed.npy"
    pack_bags(tmp_path, [("a", "A")], packed)
    whole = packed.read_bytes()
    for broken in (whole[:-1], whole[:20], b""):
        packed.write_bytes(broken)
        with pytest.raises(RunError, match="delete it and run again"):
            open_bags(packed)
    packed.write_bytes(whole)
    packed.with_suffix(".json").write_text("{}")
    with pytest.raises(RunError, match="no index of packed bags"):
        open_bags(packed)


def test_mixed_stores_are_refused(tmp_path):
    x = np.ones((2, 8), np.float32)
    write_store(tmp_path, "a", x)
    write_store(tmp_path, "b", x, {**ENCODER, "weights_sha256": "0"})
    write_store(tmp_path, "c", x, stain={"method": "none", "target": None})
    write_store(tmp_path, "d", x, grid="9px")
    write_store(tmp_path, "e", x * np.nan)
    for other, says in (
        ("b", "weights_sha256"),
        ("c", "stain: macenko and none"),
        ("d", "grid"),
        ("e", "not all finite"),
    ):
        with pytest.raises(RunError, match=says):
            load_bags(tmp_path, [("a", "A"), (other, "B")])
    with pytest.raises(SlideFailure, match="is missing"):
        load_bags(tmp_path, [("missing", "A")])
    with pytest.raises(RunError, match="No slide"):
        load_bags(tmp_path, [])
    with pytest.raises(ValueError, match="ordered"):
        make_bags(x, ["b", "a"], ["A", "A"], [1, 1], ENCODER)


# -- bundles of others ----------------------------------------------------------------------------------------------


def theirs(folder, **changes):
    """A bundle of two groups whose bundle.json was changed, and sealed again: whoever can write can seal."""
    groups = [Group(name, {"temperature": 1.0}, members(seed)) for seed, name in enumerate("ab")]
    save_bundle(folder, INFO, groups)
    path = folder / "bundle.json"
    info = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    for key, value in changes.items():
        if key in ("temperature", "intercept", "members", "name"):
            info["groups"][1][key] = value
        else:
            info[key] = value
    path.write_text(json.dumps({**info, "checksum": checksum_of(info)}))
    return folder


def checksum_of(info):
    from slidemake.core import files

    try:
        return files.checksum(info)
    except ValueError:  # numbers that JSON does not know have none
        return "0" * 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": [1.0]}, "temperature of b"),
        ({"intercept": [0.5]}, "1 intercepts for 2 classes"),
        ({"intercept": 0.5}, "intercept"),
        ({"intercept": ["0.5", 0]}, "intercept"),
        ({"temperature": float("nan")}, "it holds NaN"),
        ({"temperature": float("inf")}, "it holds Infinity"),
        ({"threshold": 7}, "threshold: 7 is not a number from 0 to 1"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": "0.5"}, "threshold: '0.5'"),
        ({"threshold": True}, "threshold"),
        ({"classes": ["N", "N"]}, "classes"),
        ({"classes": ["N"]}, "fewer than two"),
        ({"classes": []}, "fewer than two"),
        ({"positive": "X"}, "'X' is none of the classes"),
        ({"groups": []}, "groups"),
        ({"members": 0}, "members"),
        ({"members": 10**9}, "members"),
        ({"name": "../../x"}, "name"),
        ({"name": "a"}, "two have the same name"),
        ({"aggregator": {"name": "abmil_gated", "features": 8, "parameters": {"hidden": 10**7}}}, "hidden"),
        ({"aggregator": {"name": "abmil_gated", "features": 8, "parameters": {"eval": "x"}}}, "eval"),
        ({"aggregator": {"name": "abmil_gated", "features": 10**9, "parameters": {}}}, "features"),
        ({"aggregator": {"name": "of_theirs", "features": 8, "parameters": {}}}, "needs aggregator 'of_theirs'"),
        ({"tissue": []}, "tissue"),
        ({"tissue": {"overview_mpp": 1e-9}}, "tissue.overview_mpp"),
        ({"stain": {"method": "/etc/passwd"}}, "stain.method"),
        ({"stain": {"max_pixels": 1e12}}, "stain.max_pixels"),
        ({"stain_target": "tiatoolbox"}, "stain_target"),
        ({"tiling": {"min_tissue": 2}}, "tiling.min_tissue"),
        ({"features": "pickle"}, "features"),
        ({"harmonised": {"column": "site", "names": ["A"]}}, "harmonised"),
        ({"target": {"type": "regression", "unit": ""}}, "has no mean"),
        ({"target": {"type": "survival", "method": "cox", "horizons": [1.0]}}, "has no slope"),
        ({"target": {"type": "of_theirs"}}, "of_theirs"),
    ],
)
def test_bundles_with_impossible_numbers_are_refused(tmp_path, change, says):
    load_bundle(theirs(tmp_path / "good"))
    with pytest.raises(RunError, match=says) as caught:
        load_bundle(theirs(tmp_path / "bad", **change))
    assert "bundle.json" in str(caught.value) or "of_theirs" in str(caught.value)


PART = {"candidate": "one", "members": 1, "weight": 0.5, "scale": 2.0}
KIND = {"name": "abmil_gated", "parameters": {"hidden": 16, "attention": 8}}


def mixed(folder, parts, candidates=("one", "two")):
    """A bundle of one group of two members that calls them parts of a mixture."""
    about = {"name": "auto", "features": 8, "parameters": {}, "candidates": dict.fromkeys(candidates, KIND)}
    if not candidates:
        about = {**KIND, "features": 8}
    group = Group("a", {"temperature": 1.0, **({"parts": parts} if parts else {})}, members(0, 1))
    save_bundle(folder, {**INFO, "aggregator": about}, [group])
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": 0.4}, "the weights of a do not sum to 1"),
        ({"weight": 0}, "weight"),
        ({"weight": -0.5}, "weight"),
        ({"weight": "0.5"}, "weight"),
        ({"scale": 0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"scale": 1e9}, "scale"),
        ({"members": 2}, "do not have its 2 members"),
        ({"members": 0}, "members"),
        ({"candidate": "three"}, "parts of three, which are no candidates"),
        ({"more": 1}, "more"),
    ],
)
def test_mixtures_that_do_not_add_up_are_refused(tmp_path, change, says):
    other = {**PART, "candidate": "two"}
    good = load_bundle(mixed(tmp_path / "good", [PART, other]))
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(
        predict(good, x).logits, np.mean([2 * predict_bag(m, x)[0] for m in members(0, 1)], 0), atol=1e-5
    )
    with pytest.raises(RunError, match=says):
        load_bundle(mixed(tmp_path / "bad", [{**PART, **change}, other]))


def test_parts_and_candidates_belong_together(tmp_path):
    with pytest.raises(RunError, match="has no parts, and the aggregator 2 candidates"):
        load_bundle(mixed(tmp_path / "a", []))
    with pytest.raises(RunError, match="has parts, and the aggregator 0 candidates"):
        load_bundle(mixed(tmp_path / "b", [PART, {**PART, "candidate": "two"}], ()))


def test_a_bundle_without_a_checksum_is_refused(tmp_path):
    path = theirs(tmp_path / "b") / "bundle.json"
    info = json.loads(path.read_text())
    del info["checksum"]
    path.write_text(json.dumps(info))
    with pytest.raises(RunError, match="no checksum"):
        load_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda key, value: value.to(torch.int8), "int8"),
        (lambda key, value: value.double(), "float64"),
        (lambda key, value: value * 0 if key.endswith("feature_std") else value, "feature_std"),
        (lambda key, value: value / 0 if key.endswith("classifier.bias") else value, "not finite"),
    ],
)
def test_weights_of_another_type_or_without_meaning_are_refused(tmp_path, change, says):
    from safetensors.torch import load_file, save_file

    folder = theirs(tmp_path / "b")
    weights = folder / "weights.safetensors"
    save_file({key: change(key, value) for key, value in load_file(weights).items()}, weights)
    info = {key: value for key, value in json.loads((folder / "bundle.json").read_text()).items() if key != "checksum"}
    write_json(folder / "bundle.json", info | {"files": file_sums(folder, ["weights.safetensors"])})
    with pytest.raises(RunError, match=says):
        load_bundle(folder)


def test_a_prediction_that_is_no_number_is_an_error(tmp_path):
    """Weights that pass every check can still overflow on features that they were not made for."""
    groups = [Group("a", {"temperature": 1e-300}, members(1))]
    save_bundle(tmp_path / "b", INFO, groups)
    with pytest.raises(RunError, match="not a finite number"), np.errstate(all="ignore"):
        predict(load_bundle(tmp_path / "b"), np.full((3, 8), 3e38, np.float32))
