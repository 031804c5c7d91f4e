"""A planted confounder raises the alarm, an unconfounded cohort does not; robustness of embeddings against croma."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from croma import RI, CRoMa
from slidemake.robustness.neighbours import embedding_robustness
from slidemake.robustness.shortcuts import Slides, optimism, probe, probe_shortcuts


def cohort(confound=0.0, site_shift=2.0, signal=0.4, n=80, dim=12, seed=0, scans=1, sites=4):
    """Patients whose embeddings carry the site, the label follows the site for a share `confound` of them."""
    rng = np.random.default_rng(seed)
    site = np.arange(n) % sites
    follows = rng.random(n) < confound
    label = np.where(follows, site % 2, rng.integers(2, size=n))
    direction = rng.normal(size=(sites, dim))
    vectors, patients = [], []
    for i in range(n):
        for _ in range(scans):
            x = rng.normal(size=dim) + site_shift * direction[site[i]]
            x[0] += signal * (2 * label[i] - 1)
            vectors.append(x)
            patients.append(f"P{i:03d}")
    repeated = np.repeat(np.arange(n), scans)
    return Slides(
        np.array(vectors),
        tuple(patients),
        tuple("nt"[label[i]] for i in repeated),
        tuple("ABCDEFGH"[site[i]] for i in repeated),
        tuple("one" for _ in repeated),
    )


def measured(slides):
    return probe_shortcuts(slides, nulls=19)  # the smallest p is 0.05


def codes(result):
    return {finding["code"] for finding in result["findings"]}


def test_planted_confounder_raises_the_alarm():
    result = measured(cohort(confound=0.85))
    assert {"shortcut_site", "optimism"} <= codes(result)
    assert result["columns"]["site"]["probe"]["balanced_accuracy"] > 0.9
    assert result["columns"]["site"]["association"]["p"] < 0.01
    assert result["optimism"]["difference"] > 0.1
    json.dumps(result, allow_nan=False)


def test_unconfounded_cohorts_raise_none():
    """Association at 1 % and optimism at 5 %: of 4 cohorts 0.24 alarms are expected, 3 or more have p < 0.001."""
    found = [codes(measured(cohort(seed=seed, signal=0.8))) for seed in range(4)]
    assert sum(bool(said & {"shortcut_site", "optimism"}) for said in found) < 3
    result = measured(cohort(seed=1, signal=0.8))
    assert "tells_site" in codes(result)  # the site is there to be read, and is of no use
    assert result["null"]["p"] <= 0.05
    assert result["null"]["null_low"] < 0.5 < result["null"]["null_high"]


def test_sites_of_unequal_size_do_not_look_like_optimism():
    """Without any effect of the site the alarm is exact: one of 20 at most, where a site of 21 of 30 patients leaves
    nine to train on. In 40 cohorts 2 are expected, and 7 or more have p = 0.003."""
    rng, alarms = np.random.default_rng(0), 0
    for seed in range(40):
        y = rng.permutation(np.arange(30) % 2)
        x = rng.normal(size=(30, 8)) + 1.2 * np.outer(y - 0.5, np.ones(8) / 2)
        sites = tuple("A" if i < 21 else "B" if i < 27 else "C" for i in range(30))
        names = tuple(f"P{i:02d}" for i in range(30))
        found = optimism(x, Slides(x, names, tuple("nt"[k] for k in y), sites, sites), seed, 19)
        alarms += found["p"] is not None and found["p"] <= 0.05
    assert alarms < 7


def test_few_slides_of_many_features_still_tell_what_they_know():
    """24 patients, 300 features of which one tells the label and three the site, as much as a good embedding does."""
    rng = np.random.default_rng(4)
    label, site = np.arange(24) % 2, np.arange(24) // 2 % 3
    shared = rng.normal(size=(24, 6)) @ rng.normal(size=(6, 300))  # features go together, as those of embeddings do
    x = shared + 0.5 * rng.normal(size=(24, 300))
    x += 3 * np.outer(label - 0.5, rng.normal(size=300)) + 3 * rng.normal(size=(3, 300))[site]
    names = tuple(f"P{i}" for i in range(24))
    slides = Slides(x, names, tuple("nt"[k] for k in label), tuple("ABC"[k] for k in site), ("one",) * 24)
    result = measured(slides)
    assert result["columns"]["site"]["probe"]["balanced_accuracy"] > 0.9
    assert result["null"]["auroc"] > 0.9
    assert codes(result) == {"tells_site"}


def test_embeddings_that_do_not_know_the_site():
    result = measured(cohort(confound=0.85, site_shift=0.0, signal=1.0))
    assert "shortcut_site" not in codes(result)
    found = result["columns"]["site"]["within_class"]
    assert found["balanced_accuracy"] < found["null_high"] + 0.1


def test_slides_of_one_patient_do_not_tell_each_other():
    """Each patient has a vector of its own in four copies and the site says nothing: those held out are at chance."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 16)), 4, 0) + 0.01 * rng.normal(size=(160, 16))
    patients = [f"P{i // 4}" for i in range(160)]
    values = ["AB"[(i // 4) % 2] for i in range(160)]
    found = probe(x, values, patients, 0, 19)
    assert found["p"] > 0.05
    assert 0.3 < found["balanced_accuracy"] < 0.7


def test_no_signal_is_said():
    result = measured(cohort(signal=0.0, site_shift=0.0, seed=3))
    assert "no_signal" in codes(result)


@pytest.mark.parametrize("case", ["three patients", "one site", "one class", "label is the site", "no site"])
def test_little_data_has_reasons_and_no_nan(case):
    slides = cohort(n=3 if case == "three patients" else 24, sites=2)
    if case == "one site":
        slides = Slides(slides.vectors, slides.patients, slides.labels, ("A",) * 24, slides.scanners)
    elif case == "no site":
        slides = Slides(slides.vectors, slides.patients, slides.labels, ("",) * 24, slides.scanners)
    elif case == "one class":
        slides = Slides(slides.vectors, slides.patients, ("n",) * 24, slides.sites, slides.scanners)
    elif case == "label is the site":
        slides = Slides(slides.vectors, slides.patients, slides.sites, slides.sites, slides.scanners)
    result = measured(slides)
    json.dumps(result, allow_nan=False)
    if case in ("one site", "no site"):
        assert result["columns"]["site"]["reason"]
        assert result["optimism"]["reason"]
    if case == "label is the site":
        assert result["optimism"]["reason"] == "without some sites the training side has one class only"
        assert result["columns"]["site"]["robustness"]["index"] is None


@pytest.mark.parametrize(("shift", "signal"), [(0.5, 1.0), (1.5, 0.3)])
def test_robustness_equals_croma(shift, signal):
    slides = cohort(site_shift=shift, signal=signal, n=60, scans=2, seed=5)
    found = embedding_robustness(slides.vectors, slides.labels, slides.sites, slides.patients)
    count = len(slides.patients)
    manifest = pd.DataFrame(
        {
            "sample_id": [str(i) for i in range(count)],
            "image_path": [f"{i}.png" for i in range(count)],
            "label": slides.labels,
            "group_id": slides.patients,
            "site": slides.sites,
            "dataset": "d",
        }
    )
    curve = RI.compute_curve(slides.vectors, manifest, confounder_column="site", k_values=[found["k"]])
    assert found["index"] == pytest.approx(curve[found["k"]], abs=1e-9)
    oracle = CRoMa.compute(slides.vectors, manifest, confounder_column="site")
    assert found["croma"]["median"] == pytest.approx(oracle.value, abs=1e-6)
    assert found["croma"]["tail"] == pytest.approx(oracle.ltm_alpha, abs=1e-6)
    assert found["croma"]["share_site"] == pytest.approx(oracle.f0)


def test_robustness_of_pure_class_and_pure_site():
    slides = cohort(n=240, seed=2)  # more slides of a site than the largest k
    label = np.array([1.0 if one == "t" else 0.0 for one in slides.labels])
    site = np.eye(4)[["ABCD".index(s) for s in slides.sites]]
    noise = 0.01 * np.random.default_rng(0).normal(size=(240, 4))
    by_class = np.column_stack([np.eye(2)[label.astype(int)], np.zeros((240, 2))]) + noise
    args = (slides.labels, slides.sites, slides.patients)
    best, worst = embedding_robustness(by_class, *args), embedding_robustness(site + noise, *args)
    assert (best["index"], best["croma"]["median"] > 0.9) == (1.0, True)
    assert (worst["index"], worst["croma"]["median"] < -0.5) == (0.0, True)


def test_page_says_it_in_words():
    from slidemake.report.page import template_environment

    few = measured(cohort(n=3))
    page = template_environment().get_template("report_shortcuts.html.j2")
    text = page.render(task={"shortcuts": {"enc": measured(cohort(confound=0.85)), "other": few}})
    assert "a model can score by recognising the site" in text
    assert "fewer than two of 4 slides or more" in text
    assert "None" not in text
