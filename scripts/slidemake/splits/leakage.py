"""What must not cross from training to test: a patient, a scan, and what looks like the same slide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.words import some
from slidemake.splits.patients import Splits, fold_order
from slidemake.tasks.labels import why_untrainable


def check_leakage(
    rows: Iterable[Mapping[str, Any]],
    patient_of: Mapping[str, str] | None = None,
    identities: Mapping[str, str] | None = None,
) -> None:
    """Stop the run (RunError) when training data reaches a test fold.

    rows         split rows {repeat, patient_id, fold}: a patient with two folds in one repeat is a leak
    patient_of   slide -> patient, and `identities` slide -> content identity: the same scan under two patients who are
                 in different folds is a leak
    """
    seen: dict[tuple[int, str], set[str]] = defaultdict(set)
    for row in rows:
        seen[int(row["repeat"]), str(row["patient_id"])].add(str(row["fold"]))
    torn = [f"{p} (folds {', '.join(sorted(f, key=fold_order))})" for (_, p), f in sorted(seen.items()) if len(f) > 1]
    if torn:
        raise RunError(
            f"Leak: patients in two folds: {some(list(dict.fromkeys(torn)))}. Test results would be worth nothing; "
            "give each patient one fold."
        )
    holders: dict[str, set[str]] = defaultdict(set)
    for slide, identity in (identities or {}).items():
        holders[identity].add((patient_of or {}).get(slide, slide))
    for identity, patients in sorted(holders.items()):
        for repeat in sorted({r for r, _ in seen}):
            if len({f for p in patients for f in seen.get((repeat, p), ())}) > 1:
                raise RunError(
                    f"Leak: the same scan (content {identity}) belongs to patients {', '.join(sorted(patients))}, "
                    "who are in different folds. Keep one of the rows, or give both the same patient_id."
                )


def check_training_sides(splits: Splits, kind: str = "multiclass") -> None:
    """RunError when nothing can be learned from a training side. kind: type of the task."""
    for repeat in sorted(splits.folds):
        for fold in splits.tested(repeat):
            train, _, _ = splits.parts(repeat, fold)
            why = why_untrainable([splits.labels[p] for p in train], kind)
            if why:
                raise RunError(
                    f"Fold {fold!r} (repeat {repeat}), training patients: {why}. No model can be trained. Use kfold or "
                    "fewer folds."
                )
