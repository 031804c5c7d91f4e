"""Predictions in, figures with intervals and sentences out.

In reading order: evaluate, scopes, aurocs, subgroups, comparisons, clinical, choice (a model chosen by its training
patients), confounding, ranking, external, verdict, survival_words, result, files. Are probabilities what they say: the
package `probabilities`.
"""
