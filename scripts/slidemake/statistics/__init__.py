"""Arrays in, figures out: metrics, intervals and tests that know no file and no task.

In reading order: bootstrap, association, class_metrics, ordinal_metrics, regression_metrics, survival,
survival_metrics, reliability, temperature, auroc_intervals, decision_values, calibration_intervals, meta_analysis,
sample_size, sizes (when a group is too small for figures).
"""
