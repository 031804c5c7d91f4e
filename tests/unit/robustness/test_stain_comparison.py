"""The probe with and without normalisation: planted signals, ties, too few patients, and what is kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from slidemake.robustness import stain_comparison
from slidemake.robustness.stain_comparison import cohort_vectors, compare_stain


def cohort(with_signal: float, without_signal: float, patients: int = 60, seed: int = 0):
    """Two slides of each patient; the class shifts one direction of 64 by so many standard deviations."""
    rng = np.random.default_rng(seed)
    vectors, patient_of, labels = {}, {}, {}
    for i in range(patients):
        labels[f"p{i}"] = "ab"[i % 2]
        shared = rng.normal(size=64)
        for k in range(2):
            slide = f"p{i}-{k}"
            patient_of[slide] = f"p{i}"
            moved = np.eye(64)[0] * (i % 2)
            own = shared + 0.1 * rng.normal(size=64)
            vectors[slide] = {"with": own + with_signal * moved, "without": own + without_signal * moved}
    return vectors, patient_of, labels


@pytest.mark.parametrize(
    ("signals", "code"), [((0.0, 8.0), "stain_worse"), ((8.0, 0.0), "stain_better"), ((8.0, 8.0), "stain_same")]
)
def test_planted_signal_is_told(signals, code):
    found = compare_stain(*cohort(*signals))
    assert found["finding"]["code"] == code
    assert found["patients"] == 60
    assert found["difference"] == pytest.approx(found["with"] - found["without"])
    assert found["low"] <= found["difference"] <= found["high"]
    if code == "stain_worse":
        assert found["without"] > 0.9 > found["with"]
        assert found["finding"]["level"] == "warning"
        assert "stain.method: none" in found["finding"]["text"]
    if code == "stain_same":  # the same features, folds and draws: no difference at all
        assert found["low"] == found["high"] == 0


def test_no_alarm_by_chance():
    """Two noises of equal worth: a warning or praise at most about as often as 5 %."""
    codes = []
    for seed in range(20):
        vectors, patient_of, labels = cohort(0.5, 0.5, patients=40, seed=seed)
        rng = np.random.default_rng(seed)
        for found in vectors.values():
            found["with"] = found["with"] + 0.5 * rng.normal(size=64)
            found["without"] = found["without"] + 0.5 * rng.normal(size=64)
        codes.append(compare_stain(vectors, patient_of, labels)["finding"]["code"])
    assert codes.count("stain_same") >= 16


def test_too_few_patients_are_no_figure():
    vectors, patient_of, labels = cohort(8, 0, patients=2)
    found = compare_stain(vectors, patient_of, labels)
    assert (found["difference"], found["finding"]["code"]) == (None, "stain_undefined")
    assert compare_stain({}, {}, {})["finding"]["code"] == "stain_undefined"
    assert compare_stain(*cohort(8, 0, patients=8)[:2], {})["patients"] == 0


class Two(float):
    """Stands for an encoder: what threads ask of it is its device."""

    device = "cpu"


def test_what_was_embedded_is_kept(tmp_path, monkeypatch):
    calls = []

    def vectors_of(job, forward):
        calls.append(job.slide_id)
        return {} if job.slide_id == "empty" else {"with": [1.0, forward], "without": [0.0, 1.0]}

    monkeypatch.setattr(stain_comparison, "slide_vectors", vectors_of)
    jobs = [SimpleNamespace(slide_id=name, fingerprint=f"f-{name}") for name in ("a", "b", "empty")]
    first = cohort_vectors(jobs, lambda: Two(2.0), tmp_path, 2)
    assert sorted(calls) == ["a", "b", "empty"]
    again = cohort_vectors(jobs, lambda: pytest.fail("the encoder was loaded for nothing"), tmp_path, 2)
    assert again.keys() == first.keys() == {"a", "b"}
    assert again["a"]["with"].tolist() == first["a"]["with"].tolist() == [1.0, 2.0]
    jobs[0] = SimpleNamespace(slide_id="a", fingerprint="other tiles")
    cohort_vectors(jobs, lambda: Two(2.0), tmp_path, 2)
    assert calls.count("a") == 2
    one, two = (p for p in tmp_path.glob("*.json") if json.loads(p.read_text())["slide_id"] in ("b", "empty"))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    cohort_vectors(jobs, lambda: Two(2.0), tmp_path, 2)
    assert (calls.count("b"), calls.count("empty")) == (2, 2)  # what is of another slide is not taken
