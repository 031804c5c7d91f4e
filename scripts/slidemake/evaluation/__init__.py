"""Predictions in, figures with intervals and sentences out.

In reading order: evaluate_classes, evaluate_outcomes (other types of task), scopes, subgroups, comparisons, choice (a
model chosen by its training patients), ranking, external, verdict, verdict_outcomes, files. Are probabilities what they
say: the package `probabilities`.
"""
