"""Bags and folds in, the models of every fold with their predictions out.

In reading order: train, plan, members, results, words (what training says about itself), class_baselines,
linear_baseline, site_baseline, paper_tables (bags given as tables).
"""
