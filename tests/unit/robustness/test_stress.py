"""Stress tests with an encoder whose features are known: what is sampled, predicted, compared and concluded."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from slidemake.embedding.forward import Forward
from slidemake.mil.aggregators import build_aggregator
from slidemake.mil.bundle import Bundle, Group
from slidemake.robustness.stress import (
    Patient,
    conclusion,
    judge,
    levels,
    sample_tiles,
    stress_cohort,
    stress_patient,
    table_rows,
)
from toy_encoder import DIM, ToyEncoder, job, make_tiles

OPTIONS = {"tiles": 10, "corruptions": ["brightness"], "seed": 0, "patients": None}
EVALUATION = {"bootstrap": 100, "seed": 0, "level": 0.95, "stratify": True, "ece_bins": 5}


def brightness_model(cut: float) -> Bundle:
    """Says "dark" for a mean red value below `cut`."""
    import torch

    model = build_aggregator("mean_pool", DIM, 2, {})
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.weight[1, 0] = -0.5
        model.classifier.bias.copy_(torch.tensor([0.0, 0.5 * cut]))
    info = {"classes": ["bright", "dark"], "threshold": 0.5, "fingerprint": f"cut{cut}"}
    return Bundle(info, (Group("g", {"temperature": 1.0}, (model.eval(),)),))


@pytest.fixture
def cohort(tmp_path):
    """Six patients; those of class "dark" have darker tiles; P0 has two slides, P5 has none with tiles."""
    counts = {"s0": 7, "t0": 9, "s1": 4, "s2": 12, "s3": 11, "s4": 30, "s5": 0}
    for number, (name, count) in enumerate(counts.items()):
        make_tiles(tmp_path / "tiles" / f"{name}.zarr", count, number)
    jobs = {}
    for name in counts:
        import zarr

        zarr.open_group(tmp_path / "tiles" / f"{name}.zarr").attrs["mpp"] = {"requested": 0.5}
        jobs[name] = job(tmp_path, {"slide_id": name})
    slides = {f"P{i}": (jobs[f"s{i}"],) for i in range(6)}
    slides["P0"] = (jobs["s0"], jobs["t0"])
    bundle = brightness_model(129.0)
    return [Patient(p, i % 2, bundle, found) for i, (p, found) in enumerate(slides.items())]


def forward() -> Forward:
    return Forward(ToyEncoder(), "cpu", 4)


def test_the_sample_is_of_all_slides_without_repetition(cohort):
    sampled = sample_tiles(cohort[0], 10, seed=0)
    assert sum(len(indices) for _, indices in sampled) == 10
    assert [job.slide_id for job, _ in sampled] == ["s0", "t0"]
    assert all(len(set(indices.tolist())) == len(indices) for _, indices in sampled)
    assert [i.tolist() for _, i in sampled] == [i.tolist() for _, i in sample_tiles(cohort[0], 10, seed=0)]
    assert [i.tolist() for _, i in sampled] != [i.tolist() for _, i in sample_tiles(cohort[0], 10, seed=1)]
    assert [(j.slide_id, len(i)) for j, i in sample_tiles(cohort[1], 10, seed=0)] == [("s1", 4)]
    assert sample_tiles(cohort[5], 10, seed=0) == []


def test_a_model_that_harmonises_knows_the_scanners_of_the_slides(cohort):
    """The second slide's scanner is 100 too bright, and the model takes that off; other scanners stay as they are."""
    import torch
    from slidemake.stores.tile_store import TileStore

    patient, bundle = cohort[0], brightness_model(129.0)
    (model,) = bundle.groups[0].members
    model.set_domains(torch.ones((2, DIM)), torch.tensor([0.0, -100.0])[:, None].expand(2, DIM))
    bundle = replace(bundle, info={**bundle.info, "harmonised": {"column": "scanner", "names": ["good", "bright"]}})
    red = [
        TileStore(job.tiles).read_tiles(range(n))[..., 0].astype(float)
        for job, n in zip(patient.slides, (7, 9), strict=True)
    ]
    for second, off in (("bright", 100), ("unknown", 0)):
        asked = replace(patient, bundle=bundle, domains={"s0": "good", "t0": second})
        mean = np.concatenate([red[0].mean((1, 2)), red[1].mean((1, 2)) - off]).mean()
        found = stress_patient(asked, forward(), [], 100, seed=0)["none 0"]
        assert found[1] == pytest.approx(1 / (1 + np.exp(0.5 * (mean - 129.0))), abs=1e-4)


def test_probabilities_are_those_of_the_changed_tiles(cohort):
    """The mean red value after dimming is known, and so is the model's answer to it."""
    found = stress_patient(cohort[2], forward(), ["brightness"], 100, seed=0)
    assert list(found) == [f"{kind} {severity}" for kind, severity in levels(["brightness"])]
    from slidemake.stores.tile_store import TileStore

    tiles = TileStore(cohort[2].slides[0].tiles).read_tiles(range(12))
    for key, factor in (("none 0", 1.0), ("brightness 3", 0.65)):
        red = np.rint(tiles[..., 0] * factor).mean()
        assert found[key][1] == pytest.approx(1 / (1 + np.exp(0.5 * (red - 129.0))), abs=1e-4)
    assert stress_patient(cohort[5], forward(), ["brightness"], 100, seed=0) == {}


def test_what_was_computed_is_not_computed_again(cohort, tmp_path):
    made = []

    def make():
        made.append(forward())
        return made[-1]

    first = stress_cohort(cohort[:3], make, OPTIONS, {"key": "toy"}, tmp_path / "stress", 2)
    told = []
    more = stress_cohort(
        cohort, make, OPTIONS, {"key": "toy"}, tmp_path / "stress", 1, lambda d, t: told.append((d, t))
    )
    assert more[:3] == first
    assert told == [(4, 6), (5, 6), (6, 6)]
    assert len(made) == 2
    assert stress_cohort(cohort, make, OPTIONS, {"key": "toy"}, tmp_path / "stress", 1) == more
    assert len(made) == 2
    other = [replace(p, bundle=brightness_model(100.0)) for p in cohort]
    assert stress_cohort(other, make, OPTIONS, {"key": "toy"}, tmp_path / "stress", 1) != more
    assert len(made) == 3
    assert len(list((tmp_path / "stress").glob("*.json"))) == 6  # those of the other model are gone


def test_figures_agreement_and_conclusion():
    """Four of five patients of each class right at first; at severity 3 everybody gets the same score."""
    bundle = brightness_model(0.0)
    patients = [Patient(f"P{i}", i % 2, bundle, ()) for i in range(20)]
    sure = lambda y: [1 - (0.1 + 0.8 * y), 0.1 + 0.8 * y]  # noqa: E731
    found = [
        {
            "none 0": sure(p.label),
            "brightness 1": sure(p.label),
            "brightness 2": sure(p.label if i > 3 else 1 - p.label),
            "brightness 3": [0.5, 0.5],
        }
        for i, p in enumerate(patients)
    ]
    result = judge(patients, found, ["brightness"], EVALUATION)
    areas = [point["metrics"]["auroc"]["value"] for point in result["points"]]
    assert areas == pytest.approx([1.0, 1.0, 0.8, 0.5])  # 2 of 10 of each class swapped: 1 - 0.2, by symmetry
    assert [p["agreement"] for p in result["points"]] == pytest.approx([1, 1, 0.8, 0.5])
    assert [p["moved"] for p in result["points"]] == pytest.approx([0, 0, 0.16, 0.4])
    assert result["points"][3]["metrics"]["auroc"]["difference"]["value"] == pytest.approx(-0.5)
    (line,) = result["conclusion"]
    assert "Brightness costs AUROC from severity" in line["text"]
    rows = table_rows(result)
    assert len(rows) == 4 * 6
    json.dumps(result, allow_nan=False)


def test_a_number_is_judged_by_its_correlation():
    info = {"classes": [], "threshold": None, "fingerprint": "r", "target": {"type": "regression", "unit": ""}}
    patients = [Patient(f"P{i}", float(i), Bundle(info, ()), ()) for i in range(12)]
    noise = np.random.default_rng(0).normal(size=12)
    found = [
        {"none 0": [2.0 * i + 1], "blur 1": [2.0 * i + 1], "blur 2": [i + 4 * noise[i]], "blur 3": [5.0]}
        for i in range(12)
    ]
    result = judge(patients, found, ["blur"], EVALUATION)
    figures = [point["metrics"]["pearson"] for point in result["points"]]
    expected = np.corrcoef(np.arange(12), np.arange(12) + 4 * noise)[0, 1]
    assert [f["value"] for f in figures[:3]] == pytest.approx([1, 1, expected])
    assert figures[3]["reason"] == "not defined for these patients"
    assert "correlation" in result["conclusion"][0]["text"]
    assert len(table_rows(result)) == 4
    json.dumps(result, allow_nan=False)


def test_grades_are_judged_by_their_order():
    """Grades all right at first; at severity 3 everybody gets the same: a coin decides each pair."""
    info = {
        "classes": list("abc"),
        "threshold": None,
        "fingerprint": "o",
        "target": {"type": "ordinal", "classes": list("abc")},
    }
    patients = [Patient(f"P{i}", i % 3, Bundle(info, ()), ()) for i in range(18)]
    right = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    found = [
        {"none 0": right[i % 3], "blur 1": right[i % 3], "blur 2": right[i % 3], "blur 3": right[1]} for i in range(18)
    ]
    result = judge(patients, found, ["blur"], EVALUATION)
    assert result["headline"] == "c_index"
    assert [point["metrics"]["c_index"]["value"] for point in result["points"]] == pytest.approx([1, 1, 1, 0.5])


def test_one_class_and_nobody_are_not_defined():
    bundle = brightness_model(0.0)
    alone = [Patient("P", 1, bundle, ())] * 3
    found = [{f"{k} {s}": [0.2, 0.8] for k, s in levels(["blur"])}] * 3
    result = judge(alone, found, ["blur"], EVALUATION)
    assert "not above chance even without corruption" in result["conclusion"][0]["text"]
    assert result["points"][1]["metrics"]["auroc"]["reason"] == "not defined for these patients"
    json.dumps(result, allow_nan=False)
    assert judge(alone, [{}, {}, {}], ["blur"], EVALUATION)["points"] == []
    assert conclusion([], "auroc") == []
