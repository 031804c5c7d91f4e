"""The report's part on folds, comparisons, calibration, abstention and subgroups."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from simulated import by_group, evaluate_classes, simulate
from slidemake.report.page import template_environment
from slidemake.report.task import evaluation_section, titles_of
from slidemake.splits.make import make_splits

HOSTILE = "<script>alert(1)</script>"


def page(p, groups=None, **splits):
    models = [replace(p, name="abmil"), replace(p, name="other", prob=p.prob[:, :, ::-1])]
    metrics, _ = evaluate_classes(models, {"bootstrap": 100}, groups=groups)
    section = evaluation_section(metrics, splits, "abmil")
    task = SimpleNamespace(evaluation=section, titles=titles_of(metrics, "abmil"), metrics=metrics)
    return metrics, template_environment().get_template("report_evaluation.html.j2").render(task=task)


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


@pytest.fixture(scope="module")
def shown():
    p = simulate(weaker=1.5)
    p = replace(p, sites=tuple(HOSTILE if s == "B" else s for s in p.sites))
    validation = {(r, f): (p.prob[0][:40], p.labels[:40]) for r in p.repeats for f in range(4)}
    rows = [
        {"slide_id": q, "patient_id": q, "site": s, "label": "nt"[y]}
        for q, s, y in zip(p.patients, p.sites, p.labels, strict=True)
    ]
    report = make_splits(rows, "label", {"method": "site_preserved", "folds": 2}).report
    return page(replace(p, validation=validation), {"scanner": by_group(p)}, **report)


def test_every_part_shows_its_figures(shown):
    metrics, html = shown
    text = words(html)
    entry = metrics["models"]["abmil"]
    assert "Folds (site_preserved)" in text
    [pair] = [c for c in metrics["comparisons"] if c["reference"] == "other"]
    assert pair["p_holm"] < 0.0005
    assert "<b>&lt; 0.001</b>" in html  # the corrected one
    assert f"{entry['calibration']['before']['ece']:.2f}" in text
    assert f"{entry['conformal']['pooled']['coverage']['value']:.2f}" in text
    gap = entry["subgroups"]["scanner"]["gaps"]["auroc"]
    assert f"{gap['gap']['value']:.2f} {gap['gap']['low']:.2f} to {gap['gap']['high']:.2f}" in text
    assert "data:image/svg+xml" in html


def test_names_from_the_sheet_are_escaped(shown):
    assert HOSTILE not in shown[1]
    assert "&lt;script&gt;" in shown[1]


def test_little_data_has_words_instead_of_figures():
    _, html = page(simulate(n=6, repeats=1), {"scanner": {"P000": "A"}})
    text = words(html)
    assert "3 patients; 10 are needed" in text or "2 patients; 10 are needed" in text
    assert "20 are needed" in text
    assert "nan" not in text.lower()
    assert "None" not in text
