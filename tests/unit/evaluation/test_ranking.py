"""Comparison of models: ranks, critical difference and cliques against published figures and SciPy."""

import json

import numpy as np
import pytest
from scipy.stats import friedmanchisquare
from slidemake.evaluation.ranking import (
    average_ranks,
    cliques,
    compare,
    comparison_rows,
    critical_difference,
    effective_blocks,
    fold_table,
    friedman,
)
from slidemake.report.comparison import comparison_section


def metrics(table, names, controls=()):
    """metrics.json with figures (folds, models); None where not defined."""
    models = {}
    for j, name in enumerate(names):
        scopes = {f"fold:0/{i}": {"n": 10, "metrics": {"auroc": {"value": row[j]}}} for i, row in enumerate(table)}
        mean = float(np.mean([row[j] for row in table if row[j] is not None] or [0.5]))
        scopes["pooled"] = {
            "n": 50,
            "metrics": {"auroc": {"value": mean, "low": mean - 0.1, "high": mean, "reason": None}},
        }
        models[name] = {"control": name in controls, "scopes": scopes}
    return {"models": models, "patients": 50}


def test_critical_differences_of_demsar():
    """Table 5a of Demsar 2006: q is 1.960 for 2, 2.569 for 4 and 2.728 for 5 models at 0.05; his example has 14 data
    sets and 4 classifiers, CD = 1.25."""
    assert critical_difference(4, 14) == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=2e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(2, 10) == pytest.approx(1.960 * np.sqrt(2 * 3 / 60), abs=1e-3)


def test_friedman_is_scipys_statistic_in_the_form_of_iman_and_davenport():
    table = np.random.default_rng(0).normal(size=(12, 4)) + [0, 0, 0.8, 0.2]
    chi = friedmanchisquare(*table.T).statistic
    from scipy.stats import f

    expected = f.sf(11 * chi / (12 * 3 - chi), 3, 33)
    assert friedman(table, 12) == pytest.approx(expected)
    assert friedman(np.tile([1.0, 2.0, 3.0], (5, 1)), 5) == 0.0
    assert friedman(np.ones((5, 3)), 5) is None


def test_ranks_and_cliques_by_hand():
    table = np.array([[0.9, 0.8, 0.8], [0.7, 0.9, 0.6]])
    assert average_ranks(table) == pytest.approx([1.5, 1.75, 2.75])
    ranks = np.array([1.0, 1.8, 2.6, 4.0])
    assert cliques(ranks, 1.0) == [[0, 1], [1, 2]]
    assert cliques(ranks, 0.5) == []
    assert cliques(ranks, 9.0) == [[0, 1, 2, 3]]


def test_overlapping_folds_count_as_fewer():
    assert effective_blocks(15, 10, 40) == pytest.approx(1 / (1 / 15 + 0.25))


def test_comparison_of_a_cohort():
    rng = np.random.default_rng(1)
    table = [[0.9 + 0.01 * rng.random(), 0.6 + 0.1 * rng.random(), 0.6 + 0.1 * rng.random(), 0.5] for _ in range(40)]
    axes = {"a": {"loss": "x"}, "b": {"loss": "x"}, "c": {"loss": "y"}}
    result = compare(metrics(table, ["a", "b", "c", "prevalence"], ("prevalence",)), "auroc", 0.95, axes)
    assert result["models"][0]["model"] == "a"
    assert result["models"][0]["rank"] == 1.0
    assert result["blocks"] == pytest.approx(1 / (1 / 40 + 10 / 40))
    assert {v["value"]: v["models"] for v in result["axes"]["loss"]} == {"x": 2, "y": 1}
    assert len(comparison_rows(result)) == 3
    json.dumps(result, allow_nan=False)


def test_what_cannot_be_compared_says_why(tmp_path):
    from slidemake.core.files import write_json

    one = compare(metrics([[0.5], [0.6]], ["a"]), "auroc")
    assert one["reason"] == "ranks are not compared: one model"
    torn = compare(metrics([[0.5, None], [0.6, 0.7]], ["a", "b"]), "auroc")
    assert "1 folds in which every model has a figure" in torn["reason"]
    assert fold_table(metrics([[0.5, None]], ["a", "b"]), ["a", "b"], "auroc")[1] == ["fold:0/0"]
    for result in (one, torn):
        json.dumps(result, allow_nan=False)
    write_json(tmp_path / "comparison.json", one)
    assert comparison_section(tmp_path) is None
    write_json(tmp_path / "comparison.json", torn)
    assert comparison_section(tmp_path)["pictures"] == []


def test_diagram(tmp_path):
    from slidemake.core.files import write_json

    table = np.random.default_rng(2).uniform(0.5, 1, (15, 7)).tolist()
    names = [f"model-{i}" for i in range(7)]
    axes = {name: {"encoder": "ab"[i % 2]} for i, name in enumerate(names)}
    write_json(tmp_path / "comparison.json", compare(metrics(table, names), "auroc", 0.95, axes))
    pictures = comparison_section(tmp_path)["pictures"]
    assert [caption for caption, _ in pictures][1] == "By encoder"
    assert all(source.startswith("data:image/svg") for _, source in pictures)
