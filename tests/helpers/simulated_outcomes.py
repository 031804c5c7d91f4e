"""Predictions of simulated cohorts, for every type of task, as tables and as files."""

from __future__ import annotations

import csv
import io

import numpy as np
from slidemake.tasks.base import Outcome, Predictions
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.ordinal import OrdinalOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import CoxOutcome

NAMES = {"ordinal": ("a", "b", "c"), "multilabel": ("er", "pr"), "regression": (), "survival": ("2", "4", "8")}


def outcome_of(kind: str, names=()) -> Outcome:
    if kind == "ordinal":
        return OrdinalOutcome(names)
    if kind == "multilabel":
        return MultilabelOutcome(names)
    return CoxOutcome([float(name) for name in names]) if kind == "survival" else RegressionOutcome()


def truth_of(kind, n, rng):
    """(truth, what a perfect model would say of each patient)."""
    severity = rng.random(n)
    if kind == "regression":
        return severity[:, None] * 10, severity
    if kind == "ordinal":
        return np.floor(severity * 3)[:, None], severity
    if kind == "multilabel":
        truth = np.stack([severity > 0.5, severity > 0.3], 1).astype(float)
        truth[::7, 0] = -1
        return truth, severity
    died, left = rng.exponential(9 * np.exp(-3 * severity)), rng.exponential(9, n)
    return np.stack([np.minimum(died, left), died <= left], 1).astype(float), severity


def values_of(kind, severity):
    """Values (n, P) and decisions (n, Q) that follow `severity`."""
    if kind == "regression":
        return severity[:, None] * 10, np.empty((len(severity), 0))
    if kind == "ordinal":
        centre = np.clip(severity * 3 - 0.5, 0, 2)
        prob = np.exp(-((np.arange(3) - centre[:, None]) ** 2))
        prob /= prob.sum(1, keepdims=True)
        return prob, np.clip(np.floor(severity * 3), 0, 2)[:, None]
    if kind == "multilabel":
        prob = np.clip(np.stack([severity, severity + 0.2], 1), 0, 1)
        return prob, (prob > 0.5).astype(float)
    survival = np.exp(-np.outer(np.exp(3 * severity), np.array([2, 4, 8.0]) / 12))
    return np.column_stack([severity, survival]), (severity > 0.5).astype(float)[:, None]


def table(kind, name="m", n=60, noise=0.15, repeats=2, seed=0, constant=False):
    rng = np.random.default_rng(seed)
    truth, severity = truth_of(kind, n, rng)
    made = []
    for r in range(repeats):
        noisy = np.random.default_rng([seed, r, len(name)]).normal(0, noise, n)
        made.append(values_of(kind, np.full(n, 0.4) if constant else np.clip(severity + noisy, 0, 1)))
    fold = np.tile(np.arange(n) % 3, (repeats, 1))
    sites = tuple(f"s{i % 4}" if i % 4 < 3 else "" for i in range(n))
    values, decisions = (np.stack([m[k] for m in made]) for k in (0, 1))
    people = tuple(f"P{i:03d}" for i in range(n))
    about = (name, outcome_of(kind, NAMES[kind]), people, sites, truth, tuple(range(repeats)))
    return Predictions(*about, values, decisions, fold)


def written(path, kind, made):
    columns = {
        "regression": ["predicted"],
        "survival": ["risk", "survival_2", "survival_4", "survival_8", "predicted"],
        "ordinal": ["prob_a", "prob_b", "prob_c", "predicted"],
        "multilabel": ["prob_er", "prob_pr", "predicted_er", "predicted_pr"],
    }[kind]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["patient_id", "site", "label", "repeat", "fold", *columns])
    for r in range(len(made.repeats)):
        for i, patient in enumerate(made.patients):
            truth, decided = made.truth[i].tolist(), made.decisions[r, i].tolist()
            label = {
                "regression": lambda t: repr(t[0]),
                "survival": lambda t: repr(t[0]) + ("" if t[1] else "+"),
                "ordinal": lambda t: "abc"[int(t[0])],
                "multilabel": lambda t: ";".join(
                    f"{n}={'?' if v < 0 else int(v)}" for n, v in zip(("er", "pr"), t, strict=True)
                ),
            }[kind](truth)
            cells = {
                "regression": list,
                "survival": lambda d: ["high" if d[0] else "low"],
                "ordinal": lambda d: ["abc"[int(d[0])]],
                "multilabel": lambda d: [int(v) for v in d],
            }[kind](decided)
            writer.writerow([patient, made.sites[i], label, r, made.fold[r, i], *made.values[r, i].tolist(), *cells])
    path.write_text(text.getvalue())
