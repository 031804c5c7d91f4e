"""Drift: each measure against its definition, false alarms at the rate of chance, planted shifts found."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from mil_cohort import planted
from scipy.spatial.distance import pdist
from scipy.stats import ks_2samp
from slidemake.core.failures import RunError
from slidemake.core.files import write_json
from slidemake.drift.judgement import (
    Sample,
    between_sites,
    frechet,
    judge,
    kolmogorov_smirnov,
    mmd,
    permutation,
    principal_coordinates,
    psi,
)
from slidemake.drift.reference import (
    abstains,
    class_probabilities,
    make_reference,
    patient_scores,
    read_reference,
    score_columns,
    sketched,
    training_predictions,
    validation_values,
    value_cells,
    write_reference,
)
from slidemake.drift.stage import drift_rows
from slidemake.evaluation.probabilities.conformal import conformal_limit
from slidemake.report.drift import drift_section
from slidemake.tasks.classes import ClassOutcome
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import CoxOutcome


def test_mmd_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)), rng.normal(1, size=(3, 3))
    kernel = lambda a, b: np.exp(-((a - b) ** 2).sum())  # noqa: E731
    pooled = np.r_[x, y]
    gram = np.array([[kernel(a, b) for b in pooled] for a in pooled])
    within = lambda s: np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])  # noqa: E731
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd(gram, np.arange(7) < 4) == pytest.approx(within(x) + within(y) - 2 * across)


def test_frechet_of_two_normals_with_known_moments():
    """One direction: (difference of means)^2 + (difference of standard deviations)^2."""
    x, y = np.array([[-1.0], [1.0], [0.0]]), np.array([[3.0], [7.0], [5.0]])
    assert frechet(x, y) == pytest.approx(25 + (1 - 2) ** 2)


def test_psi_by_hand():
    """Two bins, edge at the median 2.5: reference 2 and 2, new 1 and 3 of 4; 1/8 is added to each share."""
    p, q = np.array([0.5, 0.5]), np.array([0.3, 0.7])
    assert psi(np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5]), bins=2) == pytest.approx(
        ((q - p) * np.log(q / p)).sum()
    )
    assert psi(np.ones(20), np.ones(9)) == pytest.approx(0, abs=1e-12)


def test_kolmogorov_smirnov_is_scipys():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        values = rng.normal(size=30).round(0 if ties else 9)
        member = np.arange(30) % 3 == 0
        expected = ks_2samp(values[member], values[~member]).statistic
        assert kolmogorov_smirnov(values)(member) == pytest.approx(expected)


def test_conformal_limit_and_abstention_by_hand():
    """Nine values, 0.9: the ceil(10 x 0.9) = 9th; eight values are too few for it."""
    assert conformal_limit(np.arange(9) / 10, 0.1) == pytest.approx(0.8)
    assert conformal_limit(np.arange(8) / 10, 0.1) == np.inf
    prob = np.array([[0.9, 0.1], [0.5, 0.5], [0.35, 0.65]])
    np.testing.assert_array_equal(abstains(prob, 0.4), [False, True, False])
    np.testing.assert_array_equal(abstains(prob, 0.6), [False, True, False])
    np.testing.assert_array_equal(abstains(prob, 0.7), [False, True, True])
    np.testing.assert_array_equal(abstains(prob, None), [False] * 3)


def test_permutation_p_is_uniform_under_the_null():
    """80 seeds: the share below 0.2 has a standard deviation of 0.045."""
    found = []
    for seed in range(80):
        values = np.random.default_rng(seed).normal(size=30)
        statistic = lambda m, v=values: abs(v[m].mean() - v[~m].mean())  # noqa: E731
        found.append(permutation(statistic, 20, 10, seed, draws=99)["p"])
    assert 0.2 - 4 * 0.045 < np.mean(np.array(found) < 0.2) < 0.2 + 4 * 0.045


def test_directions_hold_the_variance():
    x = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1e-3, 1e-3, 1e-3]
    projected = principal_coordinates(x, 2)
    assert projected[:, 0].std(ddof=1) == pytest.approx(1)
    assert projected[:, 1].std(ddof=1) == pytest.approx(x[:, 1].std() / x[:, 0].std(), rel=0.1)
    assert principal_coordinates(x[:3]).shape == (3, 2)
    assert principal_coordinates(np.ones((5, 6))).shape == (5, 1)


def test_sketches_keep_distances_and_know_no_data():
    """Johnson-Lindenstrauss: squared distances within some sqrt(2 / 128) = 12.5 %, whatever the centre."""
    x = np.random.default_rng(0).normal(size=(12, 1280)) * np.arange(1, 1281) ** -0.5
    near = pdist(sketched(x, x.mean(0)), "sqeuclidean") / pdist(x, "sqeuclidean")
    assert abs(near.mean() - 1) < 0.1
    assert near.std() < 0.25
    np.testing.assert_allclose(pdist(sketched(x, np.zeros(1280))), pdist(sketched(x, x.mean(0))))
    np.testing.assert_array_equal(sketched(x[:, :8], x[0, :8]), x[:, :8] - x[0, :8])


def test_many_distinct_features_are_no_drift():
    """1,280 features with eigenvalues 1/k, 24 training and 24 new patients of the same kind. In directions of the
    training patients alone all such cohorts differ; here each is at its nominal 5 %: 4 of 10 or more have p = 0.001."""
    levels = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        old, young = rng.normal(size=(2, 24, 1280)) * np.arange(1, 1281) ** -0.5
        known = {**reference(0, 24), "embeddings": sketched(old, old.mean(0)).tolist(), "scores": {}, "quality": {}}
        new = replace(sample(0, 24), sites=("c",) * 24, months=("",) * 24, embeddings=sketched(young, old.mean(0)))
        levels.append(judge(known, new)["groups"][0]["measures"]["embedding mmd"]["p"] < 0.05)
    assert sum(levels) < 4


def reference(seed: int, n: int = 60) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "patients": n,
        "scored": n,
        "slides": n,
        "failed": 3,
        "sites": ["a", "b"] * (n // 2),
        "embeddings": rng.normal(size=(n, 4)).tolist(),
        "scores": {"prob_y": rng.uniform(size=n).tolist()},
        "conformal": {"coverage": 0.9, "limit": 0.6, "patients": n},
        "abstained": 6,
        "quality": {"blur_fraction": rng.uniform(size=n).tolist()},
    }


def sample(seed: int, n: int = 40, shift: float = 0.0, failed: int = 2, power: float = 1.0) -> Sample:
    rng = np.random.default_rng(1000 + seed)
    scores = rng.uniform(size=n) ** power
    names = tuple(f"p{i}" for i in range(n))
    return Sample(
        names,
        ("c", "d") * (n // 2),
        ("2026-01",) * (n // 2) + ("2026-02",) * (n - n // 2),
        rng.normal(size=(n, 4)) + shift,
        {"prob_y": scores},
        np.c_[1 - scores, scores],
        names,
        (("c", "2026-01"), ("d", "2026-02")) * (n // 2),
        np.arange(n) < failed,
        {"blur_fraction": rng.uniform(size=n)},
    )


def test_no_shift_raises_few_alarms():
    """A corrected p below 0.05 in one group happens in 1 of 20 cohorts; 6 of 12 would be a 1 in 10^5 chance."""
    alone = {"sites": ("c",) * 40, "months": ("",) * 40}
    levels = [judge(reference(s), replace(sample(s), **alone))["groups"][0]["level"] for s in range(12)]
    assert sum(level != "ok" for level in levels) < 6
    assert levels.count("alarm") <= 1


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"shift": 1.5}, "embedding mmd"),
        ({"shift": 3.0}, "embedding outside"),
        ({"failed": 20}, "failed"),
        ({"power": 5.0}, "score prob_y"),
    ],
)
def test_a_planted_shift_raises_its_own_alarm(change, measure):
    found = judge(reference(0), sample(0, **change))
    whole = found["groups"][0]
    assert whole["measures"][measure]["level"] == "alarm"
    assert whole["measures"]["quality blur_fraction"]["level"] == "ok"
    assert found["conclusion"][0]["level"] == "alarm"
    assert [g["kind"] for g in found["groups"]] == ["all", "site", "site", "month", "month"]


def test_training_sites_that_lie_apart_make_no_alarm_of_the_same_distance():
    apart = reference(0)
    sites = np.where(np.arange(60) % 2, 2.0, -2.0)[:, None]
    apart["embeddings"] = (np.array(apart["embeddings"]) + sites).tolist()
    assert between_sites(np.array(apart["embeddings"]), apart["sites"]) > 0.2
    assert judge(apart, sample(0, shift=1.0))["groups"][0]["measures"]["embedding mmd"]["level"] == "watch"


@pytest.mark.parametrize("n", [0, 2])
def test_few_patients_are_not_judged(n):
    found = judge(reference(0), sample(0, n=n, failed=0))
    assert found["groups"][0]["level"] == "not judged"
    assert "Too few" in found["conclusion"][-1]["text"]
    json.dumps(found, allow_nan=False)
    assert drift_rows(found)[0]["reason"].startswith(f"{n} patients")


def test_constant_everything_is_no_drift_and_no_nan():
    flat = reference(0) | {"embeddings": np.zeros((60, 4)).tolist(), "scores": {"prob_y": [0.5] * 60}, "quality": {}}
    same = sample(0, failed=2)
    same = replace(same, embeddings=np.zeros((40, 4)), scores={"prob_y": np.full(40, 0.5)})
    found = judge(flat, same)
    json.dumps(found, allow_nan=False)
    assert found["groups"][0]["measures"]["embedding mmd"]["level"] == "ok"
    assert found["groups"][0]["measures"]["score prob_y"]["level"] == "ok"


def test_score_columns():
    two, three = ClassOutcome(["N", "Y"]), ClassOutcome(["a", "b", "c"])
    assert score_columns(two) == ["prob_Y"]
    assert score_columns(three) == ["prob_a", "prob_b", "prob_c"]
    assert score_columns(MultilabelOutcome(["a", "b"])) == ["prob_a", "prob_b"]
    assert score_columns(RegressionOutcome()) == ["predicted"]
    assert score_columns(CoxOutcome([1.0])) == ["risk"]
    rows = [{"patient_id": "p", "prob_N": "0.5", "prob_Y": v} for v in ("0.25", "0.75")]
    assert patient_scores(rows, two) == {"p": {"prob_Y": 0.5}}
    assert class_probabilities(rows, RegressionOutcome()) == {}


def test_a_reference_is_made_written_and_bound_to_its_bundle(tmp_path):
    bags, splits = planted()
    rows = [
        {"patient_id": p, "site": splits.sites[p], "label": label, "prob_N": "0.3", "prob_Y": "0.7"}
        for p, label in splits.labels.items()
    ]
    cohort = [{"slide_id": s, "status": "ok"} for s in bags.slides] + [{"slide_id": "x", "status": "failed"}]
    for slide in bags.slides[:7]:
        write_json(tmp_path / "slides" / slide / "tissue.json", {"area_mm2": 2.0, "qc": {"blur_fraction": 0.1}})
    cohort = [{**row, "patient_id": p, "site": "lab"} for row, p in zip(cohort, [*bags.patients, "P00"], strict=True)]
    made = make_reference(bags, ClassOutcome(["N", "Y"]), list(splits.labels), rows, cohort, tmp_path)
    assert (made["patients"], made["failed"], made["slides"]) == (24, 1, len(bags.slides) + 1)
    assert made["sites"] == ["lab"] * 24
    assert made["quality"] == {"area_mm2": [2.0] * 7, "blur_fraction": [0.1] * 7}
    back = np.array(made["embeddings"]) + made["centre"]
    np.testing.assert_allclose(back[0], bags.bag("P00").mean(0), atol=1e-4)  # 8 features: nothing is lost
    (tmp_path / "bundle").mkdir()
    write_json(tmp_path / "bundle" / "bundle.json", {"fingerprint": "one"})
    write_reference(made, tmp_path / "bundle" / "reference.json")
    assert read_reference(tmp_path / "bundle")["embeddings"] == made["embeddings"]
    write_json(tmp_path / "bundle" / "bundle.json", {"fingerprint": "two"})
    with pytest.raises(RunError, match="belongs to another bundle"):
        read_reference(tmp_path / "bundle")
    path = tmp_path / "bundle" / "reference.json"
    write_json(
        path, {**{k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}, "format_version": 1}
    )
    with pytest.raises(RunError, match=r"is 'slidemake-reference' version 1; .* reads .* version 2\. Delete it"):
        read_reference(tmp_path / "bundle")


def test_the_reference_is_of_the_training_patients(tmp_path):
    """A fixed test set of another hospital: none of it is in the reference, and training patients have the scores of
    the inner validation that held them out."""
    bags, splits = planted()
    people = sorted(splits.labels)
    trained, external = people[:16], people[16:]
    outcome = ClassOutcome(["N", "Y"])
    tested = [{"patient_id": p, "label": splits.labels[p], "prob_N": "0.9", "prob_Y": "0.1"} for p in external]
    folder = tmp_path / "bundles" / "repeat0_fold0"
    held = {p: [0.25, 0.75] for p in trained}
    write_json(folder / "bundle.json", {"training": {"validation_probability": held}})
    rows = training_predictions(outcome, trained, tested, validation_values(tmp_path), splits.labels)
    assert {row["patient_id"] for row in rows} == set(trained)
    cohort = [
        {"slide_id": s, "patient_id": p, "site": "new" if p in external else "old", "status": "ok"}
        for s, p in zip(bags.slides, bags.patients, strict=True)
    ]
    made = make_reference(bags, outcome, trained, rows, cohort, tmp_path, external)
    assert (made["patients"], made["scored"]) == (16, 16)
    assert set(made["sites"]) == {"old"}
    assert made["slides"] == sum(row["site"] == "old" for row in cohort)
    assert set(made["scores"]["prob_Y"]) == {0.75}
    np.testing.assert_allclose(
        np.array(made["embeddings"])[3] + made["centre"], bags.bag(trained[3]).mean(0), atol=1e-4
    )


def test_scores_among_values():
    assert value_cells(CoxOutcome([1.0, 2.0]), [0.3, 0.9, 0.8]) == {"risk": "0.3"}
    assert value_cells(RegressionOutcome(), [4.5]) == {"predicted": "4.5"}
    assert value_cells(MultilabelOutcome(["a", "b"]), [0.1, 0.2]) == {"prob_a": "0.1", "prob_b": "0.2"}


def test_section_of_the_report(tmp_path):
    assert drift_section(tmp_path) is None
    found = judge(reference(0), sample(0, shift=1.5))
    write_json(
        tmp_path / "predictions" / "drift.json", {**found, "training": {"patients": 60, "slides": 60, "failed": 3}}
    )
    section = drift_section(tmp_path)
    assert {len(row["cells"]) for row in section["table"]} == {5}
    assert section["picture"].startswith("data:image/svg")
